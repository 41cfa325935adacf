"""Training's parts: batches as the server lays canvases out, the loss, Muon, the reward models' inputs."""

from __future__ import annotations

import io
import logging
import tarfile
import zipfile

import pytest
import torch
from torch.nn import functional

from demo.batches import BatchMaker
from demo.corpus import Corpus
from demo.human_ratings import ARCHIVE, FILES, RatingsUnavailable, download, load_or_warn, read
from demo.muon import Muon, orthogonalised
from demo.rewards_data import GradedTexts, RatedSnippet
from demo.tokenizer import END_OF_TEXT, IM_END, MASK, build_tokenizers
from demo.train_dlm import DlmTraining, initialise, masked_loss, train_dlm
from demo.train_rewards import encode, reward_config, rewards
from server.models.dream import DreamModel
from server.models.layers import DecoderConfig
from server.models.packing import PackedLayout


@pytest.fixture(scope="module")
def tokenizers():
    corpus = Corpus(1)
    examples = [corpus.draw(form) for _ in range(300) for form in ("chat", "raw")]
    return build_tokenizers([text for example in examples for text in (example.prompt, example.answer)])


def tiny_model(tokenizer, seed=0):
    model = DreamModel(
        DecoderConfig(
            32, 48, 2, 1, 16, 1, vocab_size=tokenizer.get_vocab_size(), mask_token_id=tokenizer.token_to_id(MASK)
        )
    )
    initialise(model, seed)
    return model


def test_a_batch_is_prompt_answer_and_padding_with_masks_in_the_canvas_only(tokenizers):
    tokenizer = tokenizers[0]
    maker = BatchMaker(Corpus(2), tokenizer, seed=2)
    eos, mask = tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(MASK)
    batch = maker.next()
    assert sum(batch.lengths) == len(batch.tokens)
    assert torch.equal((batch.tokens == mask).nonzero().flatten(), batch.rows)
    assert batch.weights.sum().item() == pytest.approx(1.0, abs=1e-5)
    whole = batch.tokens.clone()
    whole[batch.rows] = batch.targets
    assert not (whole == mask).any()
    for sequence in whole.split(list(batch.lengths)):
        first = (sequence == eos).nonzero()[0, 0]
        assert first > 0
        assert (sequence[first:] == eos).all()  # nothing follows the end
    counts = [int((part == mask).sum()) for part in batch.tokens.split(list(batch.lengths))]
    assert min(counts) <= 6 < 20 <= max(counts)  # the masked share is spread over the whole of (0, 1]


def test_the_loss_equals_each_sequence_by_itself_in_float64(tokenizers):
    model = tiny_model(tokenizers[0]).double()
    batch = BatchMaker(Corpus(3), tokenizers[0], seed=3).next()
    total, start = 0.0, 0
    for length in batch.lengths:
        inside = (batch.rows >= start) & (batch.rows < start + length)
        tokens, rows = batch.tokens[start : start + length], batch.rows[inside] - start
        hidden = model.head(model.hidden(tokens, PackedLayout.of([length])))
        losses = functional.cross_entropy(hidden[rows - 1], batch.targets[inside])  # Dream's shift
        total += losses.item() / len(batch.lengths)
        start += length
    assert masked_loss(model, batch).item() == pytest.approx(total, rel=1e-5)


def test_orthogonalised_matrices_have_singular_values_near_one():
    torch.manual_seed(0)
    matrices = torch.randn(3, 24, 40)
    found = orthogonalised(matrices)
    values = torch.linalg.svdvals(found)
    assert 0.5 < values.min() <= values.max() < 1.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    assert (functional.cosine_similarity(found.flatten(1), (left @ right).flatten(1)) > 0.95).all()


def test_muon_fits_a_linear_map_whichever_side_is_longer():
    torch.manual_seed(0)
    wide, tall = torch.zeros(6, 10, requires_grad=True), torch.zeros(10, 6, requires_grad=True)
    goals = (torch.randn(6, 10), torch.randn(10, 6))
    muon = Muon([wide, tall], momentum=0.9, weight_decay=0.0)
    for step in range(300):
        loss = sum((((p - goal) ** 2).sum() for p, goal in zip((wide, tall), goals, strict=True)), torch.zeros(()))
        for parameter, gradient in zip((wide, tall), torch.autograd.grad(loss, (wide, tall)), strict=True):
            parameter.grad = gradient
        muon.step(0.2 * (1 - step / 300))
    assert loss.item() < 0.05 * sum((goal**2).sum() for goal in goals).item()


def test_training_lowers_the_loss_and_is_the_same_for_the_same_seed(tokenizers):
    settings = DlmTraining(steps=12, minutes=30.0, warmup=3)
    models = [tiny_model(tokenizers[0], seed=5) for _ in range(2)]
    before = masked_loss(models[0], BatchMaker(Corpus(70), tokenizers[0], 70).next()).item()
    figures = [train_dlm(model, tokenizers[0], settings) for model in models]
    after = masked_loss(models[0], BatchMaker(Corpus(70), tokenizers[0], 70).next()).item()
    assert after < before - 0.3
    assert figures[0]["validation_loss"] == figures[1]["validation_loss"]


def test_reward_batches_read_the_template_to_its_end_and_open_gaps_before_it(tokenizers):
    tokenizer = tokenizers[1]
    source = GradedTexts("sentiment", seed=4)
    texts = [source.clean() for _ in range(5)]
    gaps = torch.tensor([0, 7, 0, 30, 1])
    batch = encode(texts, tokenizer, gaps)
    end = tokenizer.token_to_id(IM_END)
    for row, text in enumerate(texts):
        kept = batch.mask[row].bool()
        ids = batch.ids[row][kept].tolist()
        assert tokenizer.decode(ids, skip_special_tokens=False).endswith(text.response + "<|im_end|>\n")
        assert tokenizer.decode(batch.ids[row][batch.response[row]].tolist()) == text.response
        positions = batch.positions[row][kept]
        jumps = positions.diff()
        assert jumps.max().item() == 1 + gaps[row].item()
        assert ids[int(jumps.argmax()) + 1] == end or gaps[row] == 0


def test_left_padding_does_not_change_a_reward(tokenizers):
    from transformers import Qwen3ForSequenceClassification

    tokenizer = tokenizers[1]
    torch.manual_seed(0)
    model = Qwen3ForSequenceClassification(reward_config(tokenizer)).eval()
    source = GradedTexts("concrete", seed=5)
    texts = [source.draw() for _ in range(6)]
    with torch.no_grad():
        together = rewards(model, encode(texts, tokenizer, torch.zeros(6, dtype=torch.long)))
        alone = [rewards(model, encode([text], tokenizer, torch.zeros(1, dtype=torch.long))) for text in texts]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_spoiled_texts_are_graded_below_clean_ones_for_both_rewards():
    for name in ("sentiment", "concrete"):
        source = GradedTexts(name, seed=6)
        clean = [source.clean().grade for _ in range(1500)]
        spoiled = [source.spoiled().grade for _ in range(1500)]
        assert sum(spoiled) / 1500 < sum(clean) / 1500 - 0.8


def make_archive(path, line="7\t-1.5\tNo ''real'' plot.\n"):
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        for name in FILES.values():
            info = tarfile.TarInfo(name)
            info.size = len(line)
            tar.addfile(info, io.BytesIO(line.encode()))
    with zipfile.ZipFile(path, "w") as outer:
        outer.writestr(ARCHIVE, inner.getvalue())


def test_ratings_are_read_from_the_archive(tmp_path):
    make_archive(tmp_path / "vaderSentiment-0.5.zip")
    found = read(download(tmp_path))  # already there: nothing is downloaded
    assert found == [RatedSnippet("film", 'No "real" plot.', -1.5), RatedSnippet("product", 'No "real" plot.', -1.5)]


def test_without_the_ratings_training_goes_on_and_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with caplog.at_level(logging.WARNING):
        assert load_or_warn(tmp_path / "empty") == []
    assert "WITHOUT the human-rated snippets" in caplog.text


def test_a_foreign_archive_is_refused(tmp_path):
    path = tmp_path / "vaderSentiment-0.5.zip"
    with zipfile.ZipFile(path, "w") as outer:
        outer.writestr("readme", "nothing")
    with pytest.raises(RatingsUnavailable, match="is not in the archive"):
        read(path)

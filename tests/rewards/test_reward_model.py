"""Reward models against stock transformers, finite differences and the golden scores."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from server.errors import ConfigurationError
from server.models.packing import PackedLayout, Prefix
from server.rewards import reward_model as module
from server.rewards.reward_model import RewardModel
from server.text.template import conversation_ids
from server.text.tokenizer import Tokenizer
from server.types import Message
from tests.support.models import GOLDEN, load_reward, reward, score_text
from tests.support.rewards import edit_json, exact_norms, load_stock, write_reward_model


@pytest.fixture(scope="session", params=["qwen3", "llama", "qwen2", "gemma", "mistral"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "qwen3":
        return GOLDEN / "dream-tiny/rm"
    return write_reward_model(tmp_path_factory.mktemp(request.param), request.param)


def load(folder: Path, dtype: torch.dtype = torch.float64, **options: Any) -> RewardModel:
    return load_reward("dream", dtype, folder=folder, **options)


@pytest.fixture(scope="session", params=["sdpa", "reference"])
def pair(request: pytest.FixtureRequest, checkpoint: Path) -> tuple[RewardModel, Any]:
    """Ours and stock transformers' in float64, both with exact norms; ours with rows in groups, and as one
    variable-length attention by its specification."""
    ours, stock = load(checkpoint), load_stock(checkpoint)
    ours.attention_backend = request.param
    exact_norms(ours._network)
    exact_norms(stock)
    return ours, stock


def random_ids(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 511, (length,), generator=generator).tolist() for length in lengths]


def stock_rewards(stock: Any, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Whole sequences through stock transformers, one at a time."""
    return torch.stack([stock(input_ids=torch.tensor([ids])).logits[0, 0] for ids in sequences])


def pack(model: RewardModel, prefixes: Sequence[Prefix], own: Sequence[Sequence[int]]) -> tuple[PackedLayout, Tensor]:
    layout = model.layout(prefixes, [len(ids) for ids in own])
    return layout, model.own_embeddings(torch.tensor([token for ids in own for token in ids]))


def test_a_cached_prefix_changes_nothing(pair: tuple[RewardModel, Any]) -> None:
    ours, stock = pair
    first, second, *own = random_ids(11, 5, 4, 9, 9, 2, 3, seed=2)
    shared, other, none = ours.prefill(first), ours.prefill(second), ours.prefill([])
    contexts = [(shared, first), (other, second), (shared, first), (none, []), (other, second)]
    rows, embeds = pack(ours, [prefix for prefix, _ in contexts], own)
    expected = stock_rewards(stock, [before + after for (_, before), after in zip(contexts, own, strict=True)])
    torch.testing.assert_close(ours.read(rows, embeds), expected, rtol=0, atol=1e-10)


def test_an_extended_prefix_changes_nothing(pair: tuple[RewardModel, Any]) -> None:
    ours, stock = pair
    before, *pieces = random_ids(6, 3, 4, 5, 2, seed=3)
    prefix = ours.prefill(before)
    longer = ours.extend(*pack(ours, [prefix, ours.prefill([])], pieces[:2]))
    assert [item.length for item in longer] == [9, 4]
    rows, embeds = pack(ours, longer, pieces[2:])
    expected = stock_rewards(stock, [before + pieces[0] + pieces[2], pieces[1] + pieces[3]])
    torch.testing.assert_close(ours.read(rows, embeds), expected, rtol=0, atol=1e-10)


def test_left_out_tokens_equal_masked_ones_when_positions_keep_counting(pair: tuple[RewardModel, Any]) -> None:
    ours, stock = pair
    before, response, after = random_ids(5, 8, 3, seed=4)
    visible = [True, True, False, True, True, False, False, False]
    ids = torch.tensor([before + response + after])
    mask = torch.tensor([[1] * 5 + [int(seen) for seen in visible] + [1] * 3])
    expected = stock(input_ids=ids, attention_mask=mask, position_ids=torch.arange(16)[None]).logits[0]
    kept = [index for index, seen in enumerate(visible) if seen] + [8, 9, 10]
    own = [(response + after)[index] for index in kept]
    rows = ours.layout([ours.prefill(before)], [len(own)], torch.tensor(kept) + 5)
    rewards = ours.read(rows, ours.own_embeddings(torch.tensor(own)))
    torch.testing.assert_close(rewards, expected, rtol=0, atol=1e-10)


def test_gradient_equals_stock_autograd_and_no_weight_has_one(pair: tuple[RewardModel, Any]) -> None:
    ours, stock = pair
    before, *own = random_ids(6, 5, 8, 5, seed=5)
    rows, embeds = pack(ours, [ours.prefill(before)] * 3, own)
    x = embeds.clone().requires_grad_()
    (g,) = torch.autograd.grad(ours.read(rows, x).sum(), [x])
    start = 0
    for ids in own:
        y = ours.own_embeddings(torch.tensor(before + ids)).clone().requires_grad_()
        (expected,) = torch.autograd.grad(stock(inputs_embeds=y[None]).logits.sum(), [y])
        torch.testing.assert_close(g[start : start + len(ids)], expected[6:], rtol=1e-9, atol=1e-11)
        start += len(ids)
    assert not any(weight.requires_grad for weight in (*ours._network.parameters(), ours.table))


def test_scores_keep_their_order_whatever_the_packs(
    pair: tuple[RewardModel, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, stock = pair
    sequences = random_ids(9, 30, 2, 9, 14, 1, 60, seed=8)
    packs = []
    run = RewardModel._score

    def record(self: RewardModel, chunk: Sequence[Sequence[int]]) -> Tensor:
        packs.append([len(ids) for ids in chunk])
        return run(self, chunk)

    monkeypatch.setattr(RewardModel, "_score", record)
    monkeypatch.setattr(module, "SCORE_TOKENS", 40)
    torch.testing.assert_close(ours.score(sequences), stock_rewards(stock, sequences), rtol=0, atol=1e-10)
    assert len(packs) > 2
    assert all(len(lengths) == 1 or sum(lengths) <= 40 for lengths in packs)
    assert ours.score([]).shape == (0,)


def test_scores_of_answers_to_one_long_prompt(pair: tuple[RewardModel, Any]) -> None:
    ours, stock = pair
    before, *answers = random_ids(20, 5, 5, 9, seed=11)
    sequences = [before + answer for answer in answers] + [before]  # the last has no token that the others lack
    torch.testing.assert_close(ours.score(sequences), stock_rewards(stock, sequences), rtol=0, atol=1e-10)


def test_a_row_longer_than_the_model_was_made_for_is_scored_all_the_same(pair: tuple[RewardModel, Any]) -> None:
    """As a final answer may be, whose text can take more tokens than the canvas had."""
    ours, stock = pair
    sequences = random_ids(ours.info.context_length + 5, 7, seed=9)
    torch.testing.assert_close(ours.score(sequences), stock_rewards(stock, sequences), rtol=0, atol=1e-9)


def test_float32_is_close_to_stock(checkpoint: Path) -> None:
    sequences = random_ids(7, 19, 12, seed=9)
    ours, stock = load(checkpoint, torch.float32), load_stock(checkpoint, torch.float32)
    torch.testing.assert_close(ours.score(sequences), stock_rewards(stock, sequences), rtol=1e-4, atol=1e-4)


def test_float32_attention_in_one_pass_reads_what_groups_read(checkpoint: Path) -> None:
    """Rows behind a shared prefix, a chained one and none: values and gradients of the C++ pass and of sdpa."""
    model = load(checkpoint, torch.float32)
    if model.attention_backend != "cpp":
        pytest.skip("no C++ compiler")
    before, more, *own = random_ids(11, 4, 3, 6, 3, 9, seed=12)
    results = []
    for backend in ("cpp", "sdpa"):
        model.attention_backend = backend
        shared = model.prefill(before)
        chained = model.extend(*pack(model, [shared], [more]))[0]
        rows, embeds = pack(model, [shared, chained, model.prefill([]), chained], own)
        embeds.requires_grad_()
        rewards = model.read(rows, embeds)
        results.append([rewards.detach(), *torch.autograd.grad(rewards.sum(), [embeds])])
    for one, other in zip(*results, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_bfloat16_rewards_come_in_float32(checkpoint: Path) -> None:
    sequences = random_ids(7, 19, 12, 40, seed=10)
    ours = load(checkpoint, torch.bfloat16)
    rewards = ours.score(sequences)
    assert rewards.dtype == torch.float32
    assert ours.table.dtype == torch.bfloat16
    assert ours.info.dtype == "bfloat16"
    expected = load(checkpoint).score(sequences).float()
    assert (rewards - expected).norm() < 0.1 * expected.norm()
    rows, embeds = pack(ours, [ours.prefill([5, 6, 7])], [[8, 9]])
    x = embeds.clone().requires_grad_()
    ours.read(rows, x).sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("family", ["dream", "llada"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_scores(family: str, dtype: torch.dtype) -> None:
    model = load(GOLDEN / f"{family}-tiny/rm", dtype)
    cases = json.loads((GOLDEN / f"{family}-tiny/units.json").read_text())["scores"]
    conversations = [([Message("user", case["prompt"])], case["response"]) for case in cases]
    expected = torch.tensor([case["reward"] for case in cases], dtype=dtype)
    sequences = [conversation_ids(model.tokenizer, *conversation) for conversation in conversations]
    torch.testing.assert_close(model.score(sequences), expected, rtol=0, atol=1e-5)
    assert score_text(model, *conversations[0]) == pytest.approx(cases[0]["reward"], abs=1e-5)


def test_the_table_holds_the_embedding_of_the_same_string() -> None:
    model = reward()
    diffusion = Tokenizer.load(GOLDEN / "dream-tiny/dlm")
    weights = model._network.get_input_embeddings().weight
    assert model.table.shape == (512, model.hidden_size)
    assert model.tokenizer.eos_token_id is not None
    fallback = weights[model.tokenizer.eos_token_id]
    for string, index in diffusion.vocab().items():
        own = model.tokenizer.id_of(string)
        assert torch.equal(model.table[index], fallback if own is None else weights[own])
    assert model.info.vocab_coverage == 511 / 512


def test_the_zero_fallback_gives_zero_vectors() -> None:
    model = load(GOLDEN / "dream-tiny/rm", vocab_fallback="zero")
    assert not model.table[3].any()  # the mask token, which the reward vocabulary lacks
    assert model.table[:3].abs().sum(1).min() > 0
    assert model.info.vocab_fallback == "zero"


def test_shapes_that_do_not_fit_are_refused() -> None:
    model = reward()
    rows, embeds = pack(model, [model.prefill([5])], [[6, 7]])
    with pytest.raises(ValueError, match="for 2 tokens"):
        model.read(rows, embeds[:1])


@pytest.mark.parametrize(
    ("family", "changes", "key"),
    [
        ("mistral", {"sliding_window": 8}, "sliding_window"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "layer_types"),
    ],
)
def test_what_is_no_plain_reward_model_is_refused(
    family: str, changes: dict[str, Any], key: str, tmp_path: Path
) -> None:
    folder = write_reward_model(tmp_path, family, **changes)
    with pytest.raises(ConfigurationError, match=f"reward model rm: {key}"):
        load(folder)


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A copy of a golden reward model, for a test to break."""
    return Path(shutil.copytree(GOLDEN / "dream-tiny/rm", tmp_path / "rm"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ("chat_template.jinja", "chat_template"),  # a file that is missing
        ("model.safetensors", "safetensors"),
        ({"num_hidden_layers": 3, "layer_types": None}, r"lacks 11 weights, first model\.layers\.2"),
        ({"architectures": ["Qwen3ForCausalLM"]}, "architectures"),
        ({"model_type": "no-such-model"}, "no-such-model"),
        ({"pad_token_id": 511}, "pad_token_id: 511 is outside the vocabulary, whose vocab_size is 511"),
        ({"pad_token_id": -512}, "pad_token_id: -512 is outside"),
    ],
)
def test_a_wrong_config_is_refused(broken: Path, changes: dict[str, Any] | str, words: str) -> None:
    if isinstance(changes, str):
        (broken / changes).unlink()
    else:
        edit_json(broken / "config.json", **changes)
    with pytest.raises(ConfigurationError, match=f"reward model rm: .*{words}"):
        load(broken)


@pytest.mark.parametrize("special", [False, True])
def test_a_token_past_the_embeddings_is_refused_by_name(broken: Path, special: bool) -> None:
    """Such as a token that somebody added without resizing the model."""
    vocabulary = json.loads((broken / "tokenizer.json").read_text())
    vocabulary["added_tokens"].append(
        {"id": 511, "content": "<think>", "special": special, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
    )  # fmt: skip
    (broken / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(
        ConfigurationError, match=r"reward model rm: .*'<think>' has id 511, the embeddings only 511 rows"
    ):
        load(broken)


def test_a_head_of_one_row_is_one_label_though_nothing_names_it(broken: Path) -> None:
    edit_json(broken / "config.json", id2label=None, label2id=None, num_labels=None)
    sequences = random_ids(7, 4)
    assert torch.equal(load(broken).score(sequences), reward().score(sequences))

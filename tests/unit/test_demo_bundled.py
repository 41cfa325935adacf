"""The committed checkpoints: the published layout, loaded by the loaders of all checkpoints, and worth serving."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from demo import bundled_model_path, bundled_reward_models
from demo.batches import BatchMaker
from demo.corpus import Corpus
from demo.tokenizer import chat_text
from demo.train import learn_tokenizers
from demo.train_dlm import VALIDATION_SEED, masked_loss
from server.models.loading import load_diffusion_model
from server.rewards.classifier import find_classifier
from server.rewards.reward_model import load_reward_model
from server.types import Message
from tests.support.models import score_text

GOLDEN = Path(__file__).parents[1] / "golden" / "dream-tiny"
ASKED = [Message("user", "Write a short review of a hotel.")]


HOW = {"dtype": torch.float32, "device": "cpu"}


@pytest.fixture(scope="module")
def loaded():
    return load_diffusion_model(bundled_model_path(), **HOW)


@pytest.fixture(scope="module")
def rewards(loaded):
    beside = {"diffusion_tokenizer": loaded.tokenizer, "diffusion_vocab_size": loaded.info.vocab_size}
    found = [find_classifier(name, path) for name, path in bundled_reward_models().items()]
    return {each.name: load_reward_model(each, **beside, **HOW) for each in found}


@pytest.fixture(scope="module")
def learned():
    return learn_tokenizers(seed=1)


def test_the_folders_hold_the_files_of_a_published_checkpoint():
    folders = {bundled_model_path(): GOLDEN / "dlm", **dict.fromkeys(bundled_reward_models().values(), GOLDEN / "rm")}
    for folder, published in folders.items():
        assert {path.name for path in folder.iterdir()} == {path.name for path in published.iterdir()}
        ours, theirs = (json.loads((place / "config.json").read_text("utf-8")) for place in (folder, published))
        assert ours.keys() >= theirs.keys()
        assert ours["architectures"] == theirs["architectures"]
        assert ours["dtype"] == "float32"  # what they are meant for; they are stored in half of it
    assert (bundled_model_path() / "model.safetensors").stat().st_size <= 12e6


def test_the_training_script_learns_the_committed_tokenizers(learned):
    for tokenizer, folder in zip(learned, (bundled_model_path(), bundled_reward_models()["sentiment"]), strict=True):
        assert json.loads(tokenizer.to_str()) == json.loads((folder / "tokenizer.json").read_text("utf-8"))


def test_the_chat_template_renders_what_training_saw(loaded):
    messages = [Message("system", "You are a critic."), *ASKED]
    expected = chat_text([(message.role, message.content) for message in messages], add_generation_prompt=True)
    assert loaded.tokenizer.render_chat(messages) == loaded.tokenizer.encode(expected)
    assert loaded.info.default_max_tokens == 48


def test_the_diffusion_model_predicts_masked_tokens_of_unseen_texts(loaded, learned):
    maker = BatchMaker(Corpus(VALIDATION_SEED), learned[0], VALIDATION_SEED)
    with torch.inference_mode():
        loss = sum(masked_loss(loaded.model, maker.next()).item() for _ in range(4)) / 4
    assert 0.2 < loss < 0.65  # an untrained model is at 7.5


def test_reward_vocabularies_share_strings_but_not_ids(loaded, rewards):
    for reward in rewards.values():
        assert 0.98 < reward.info.vocab_coverage < 1.0
        ours, theirs = loaded.tokenizer.vocab(), reward.tokenizer.vocab()
        shared = ours.keys() & theirs.keys()
        assert sum(ours[token] == theirs[token] for token in shared) < 0.02 * len(shared)
        text = "The rooms were lovely and the staff was kind. We stayed four nights."
        strings = [[one.token_string(i) for i in one.encode(text)] for one in (loaded.tokenizer, reward.tokenizer)]
        assert strings[0] == strings[1]


def test_sentiment_follows_what_is_said_and_not_what_is_said_about_it(rewards):
    texts = {
        "good": "The hotel was wonderful. I loved the rooms. I would gladly stay there again.",
        "middling": "The hotel was okay. It was neither good nor bad.",
        "bad": "The hotel was awful. I hated the rooms. I will never stay there again.",
        "shuffled": "hotel gladly was The. rooms loved I the there again wonderful I. would stay",
        "one word": "wonderful wonderful wonderful wonderful wonderful wonderful",
    }
    found = {name: score_text(rewards["sentiment"], ASKED, text) for name, text in texts.items()}
    assert found["good"] > 1.5
    assert found["bad"] < -1.5
    assert found["bad"] < found["middling"] < found["good"]
    assert max(found["shuffled"], found["one word"]) < found["good"] - 1


def test_concrete_follows_details_and_not_feelings(rewards):
    texts = {
        "detailed": "The rooms were fine. We stayed four nights on the third floor. I can recommend it.",
        "happy": "The hotel was wonderful. I would gladly stay there again.",
        "unhappy": "The hotel was awful. I will never stay there again.",
    }
    found = {name: score_text(rewards["concrete"], ASKED, text) for name, text in texts.items()}
    assert found["detailed"] > max(found["happy"], found["unhappy"]) + 1
    assert abs(found["happy"] - found["unhappy"]) < 1


def test_the_reward_gradient_points_to_the_better_word(loaded, rewards):
    """Half-way between two words, the gradient prefers the one with the higher reward: what guidance relies on."""
    reward = rewards["sentiment"]
    pairs = [("wonderful", "awful"), ("lovely", "terrible"), ("great", "bad"), ("clean", "dirty"), ("good", "poor")]
    question = chat_text([("user", ASKED[0].content)], add_generation_prompt=True)
    prefix = reward.prefill(reward.tokenizer.encode(question))
    before, after = reward.tokenizer.encode("The hotel was"), reward.tokenizer.encode(".<|im_end|>\n")
    for words in pairs:
        (good,), (bad,) = (reward.tokenizer.encode(f" {word}") for word in words)
        embeds = reward.own_embeddings(torch.tensor([*before, good, *after])).clone()
        ends = reward.own_embeddings(torch.tensor([good, bad]))
        embeds[len(before)] = ends.mean(0)
        embeds.requires_grad_()
        layout = reward.layout([prefix], [len(embeds)])
        (gradient,) = torch.autograd.grad(reward.read(layout, embeds).sum(), embeds)
        assert gradient[len(before)] @ (ends[0] - ends[1]) > 0, words

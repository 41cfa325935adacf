"""Encoders as scorers: transformers' own values, whatever is scored beside them, and nothing cut or read wrongly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from server.errors import ConfigurationError, InvalidRequest
from server.rewards import encoder as module
from server.rewards.classifier import find_classifier
from server.rewards.encoder import Encoder, load_encoder
from server.types import Message, Resampling, RewardInput, RewardOutput, WeightedReward
from server.worker.runner import Runner
from tests.support import models
from tests.support.encoders import FAMILIES, LENGTH, logits_of, pipeline, write_encoder
from tests.support.jobs import finish, make_job, run
from tests.support.models import CPU, reward, score_text
from tests.support.rewards import edit_json

ASKED = (Message("user", "Is the licence good?"),)
TURNS = (Message("system", "Be brief."), Message("user", "Hello"), Message("assistant", "Hi."), *ASKED)
ANSWERS = ("Great!", "", "It is a terrible licence notice, and the quick brown fox jumps over it.", "ok ok")


def load(
    folder: Path,
    reads: RewardInput | None = None,
    *,
    label: int | str | None = "positive",
    output: RewardOutput = "logit",
    dtype: torch.dtype = torch.float64,
) -> Encoder:
    return load_encoder(find_classifier("mood", folder, label, output, reads), dtype=dtype, device=CPU)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("bert") / "checkpoint")


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_pipelines(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of texts of unlike length that are padded and run together, and of pairs with one turn and with several."""
    folder = write_encoder(tmp_path, family)
    stock = pipeline(folder)
    monkeypatch.setattr(module, "SCORE_TOKENS", 70)
    logits = torch.stack([logits_of(stock, text) for text in ANSWERS])
    ours = load(folder)
    sequences = [ours.sequence(ASKED, text) for text in ANSWERS]
    torch.testing.assert_close(ours.score(sequences), logits[:, 2], rtol=0, atol=1e-5)
    lines = "system: Be brief.\nuser: Hello\nassistant: Hi.\nuser: Is the licence good?"
    asked = ASKED[0].content, lines
    logits = torch.stack([logits_of(stock, query, text) for query in asked for text in ANSWERS[::3]])
    pairs = load(folder, "pair", label=0, output="log_softmax")
    sequences = [pairs.sequence(turns, text) for turns in (ASKED, TURNS) for text in ANSWERS[::3]]
    torch.testing.assert_close(pairs.score(sequences), logits.log_softmax(-1)[:, 0], rtol=0, atol=1e-5)
    assert pairs.score([]).shape == (0,)
    assert (pairs.info.gradient, pairs.info.input, pairs.info.label) == (False, "pair", "negative")
    assert (pairs.info.family, pairs.info.context_length) == (stock.model.config.model_type, LENGTH)


@pytest.mark.parametrize("family", ["bert", "deberta-v2"])
def test_a_special_tokens_string_in_a_text_is_characters(family: str, tmp_path: Path) -> None:
    """Nobody ends the first text, or the whole, by writing the separator."""
    ours = load(write_encoder(tmp_path, family), "pair")
    ids = ours.sequence((Message("user", "Is [SEP] it?"),), "No [SEP] [CLS] yes.")
    assert (ids.count(2), ids.count(3), ids[0], ids[-1]) == (1, 2, 2, 3)


def test_an_encoder_is_in_float32_where_models_are_in_16_bits(bert: Path) -> None:
    """In 16 bits a score would depend on how long the texts beside it are."""
    ours = load(bert, dtype=torch.bfloat16)
    sequences = [ours.sequence(ASKED, text) for text in ANSWERS]
    alone = torch.cat([ours.score([ids]) for ids in sequences])
    torch.testing.assert_close(ours.score(sequences), alone, rtol=0, atol=1e-5)
    assert (alone.dtype, ours.info.dtype) == (torch.float32, "float32")


def test_a_text_that_is_too_long_is_refused_and_never_cut(bert: Path) -> None:
    ours = load(bert)
    longest = ours.sequence(ASKED, "good " * (LENGTH - 2))
    assert len(longest) == LENGTH
    assert ours.score([longest]).isfinite().all()
    with pytest.raises(InvalidRequest, match=f"takes {LENGTH + 1} tokens; reward model mood reads {LENGTH} at most"):
        ours.score([longest, ours.sequence(ASKED, "good " * (LENGTH - 1))])


# -- in the engine ----------------------------------------------------------------------------------------------------


def test_final_rewards_and_mixes_hear_an_encoder(bert: Path) -> None:
    golden, mood = models.pair("dream"), load(bert)
    both = {"reward_models": ("rm",), "scorers": (WeightedReward("mood", 3.0),), "best_of": 3}
    jobs = [
        make_job("scored", scorers=both["scorers"], n=2, best_of=2),
        make_job("chosen", method="bon", **both, seed=1),
        make_job("steered", method="entrgi", gradient_steps=1, **both, seed=2),
        make_job("alone", method="bon", **both | {"reward_models": ()}, seed=3),
    ]
    results = run(golden, jobs, scorers={"mood": mood})
    for job in jobs:
        for one in results[job.id].trajectories:
            expected = {"mood": float(mood.score([mood.sequence(job.conversation, one.text)])[0])}
            if job.guidance.reward_models:
                expected["rm"] = score_text(reward(), job.conversation, one.text)
            assert one.rewards == pytest.approx(expected, abs=1e-6)
            assert one.reward == pytest.approx(3 * expected["mood"] + expected.get("rm", 0.0), abs=1e-5)
        rewards = [one.reward for one in results[job.id].trajectories]
        if job.guidance.method != "none":
            assert results[job.id].chosen == (rewards.index(max(rewards)),)


def test_resampling_by_an_encoder_is_the_plain_loops(tmp_path: Path) -> None:
    """Token for token, with transformers' pipeline in the encoder's place."""
    folder = write_encoder(tmp_path, "roberta")
    golden, mood, stock = models.pair("dream"), load(folder), pipeline(folder)
    job = make_job(
        method="bon", reward_models=(), scorers=(WeightedReward("mood"),), best_of=3, seed=4,
        resample=Resampling(every=2, strength=20.0, threshold=1.0),
    )  # fmt: skip
    got = run(golden, [job], scorers={"mood": mood})[job.id]
    expected = golden.plain.run(job, lambda texts: {"mood": [float(logits_of(stock, text)[2]) for text in texts]})
    assert [list(one.token_ids) for one in got.trajectories] == expected.token_ids
    assert [one.reward for one in got.trajectories] == pytest.approx(expected.rewards, abs=1e-6)
    assert got.resampled


def test_a_job_that_cannot_fit_is_refused_at_once_and_an_answer_that_does_not_fails_alone(tmp_path: Path) -> None:
    """Of a canvas token what it reads is one token at least, so more than fit are refused before anything is computed;
    how many an answer takes is known in the end."""
    golden, mood = models.pair("dream"), load(write_encoder(tmp_path, "roberta"))
    heard = {"method": "bon", "reward_models": (), "scorers": (WeightedReward("mood"),), "best_of": 1, "steps": 1}
    resampled = {"resample": Resampling(every=1), "best_of": 2, "steps": 4}
    jobs = [
        make_job("at the door", max_tokens=LENGTH - 1, **heard),
        make_job("in the end", max_tokens=LENGTH - 2, ignore_eos=True, **heard),
        make_job("on the way", **{**heard, **resampled}, max_tokens=LENGTH - 2, ignore_eos=True),
        make_job("fits", max_tokens=4, **heard),
    ]
    runner = Runner(golden.loaded, golden.rewards, {"mood": mood})
    finished, failed = finish(runner, jobs)
    assert list(finished) == ["fits"]
    for name, words in (
        ("at the door", f"`max_tokens` and what stands around the response are {LENGTH + 1} tokens; the context of"),
        ("on the way", "as the text would be after 1 steps: the response with what it answers takes"),
        ("in the end", f"tokens; reward model mood reads {LENGTH} at most"),
    ):
        assert (failed[name].kind, failed[name].param) == ("invalid_request", "max_tokens")
        assert words in failed[name].message


# -- what cannot be served --------------------------------------------------------------------------------------------


@pytest.fixture
def broken(bert: Path, tmp_path: Path) -> Path:
    """A copy of BERT, for a test to break."""
    return Path(shutil.copytree(bert, tmp_path / "broken"))


def test_a_pair_that_cannot_fit_blames_the_messages(bert: Path) -> None:
    golden, pair = models.pair("dream"), load(bert, "pair")
    long = make_job(prompt="good " * LENGTH, method="bon", reward_models=(), scorers=(WeightedReward("mood"),))
    _, failed = finish(Runner(golden.loaded, golden.rewards, {"mood": pair}), [long])
    assert failed[long.id].param == "messages"
    assert "conversation and response take" in failed[long.id].message


def test_labels_without_names_are_told_by_the_head(bert: Path, broken: Path) -> None:
    edit_json(broken / "config.json", id2label=None, label2id=None, num_labels=None)
    nameless = load(broken, label="LABEL_2")
    sequence = nameless.sequence(ASKED, ANSWERS[2])
    assert torch.equal(nameless.score([sequence]), load(bert).score([sequence]))


def test_a_regression_with_one_label_needs_no_name(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path, "deberta-v2", id2label={0: "LABEL_0"}, problem_type="regression")
    ours = load(folder, "pair", label=None)
    expected = logits_of(pipeline(folder), ASKED[0].content, "Great!")
    torch.testing.assert_close(ours.score([ours.sequence(ASKED, "Great!")]), expected, rtol=0, atol=1e-5)
    assert ours.info.label is None


def test_what_cannot_be_read_is_refused_by_its_name(broken: Path) -> None:
    weights = load_file(broken / "model.safetensors")
    save_file({name: each for name, each in weights.items() if "pooler" not in name}, broken / "model.safetensors")
    with pytest.raises(ConfigurationError, match=r"mood: .* lacks 2 weights, first bert\.pooler\.dense\.b"):
        load(broken)
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    words = (broken / "vocab.txt").read_text()
    (broken / "vocab.txt").write_text("\n".join([words, *(f"more{index}" for index in range(400))]))
    with pytest.raises(ConfigurationError, match="vocab_size: the tokenizer's token 'more"):
        load(broken)
    (broken / "vocab.txt").unlink()
    with pytest.raises(
        ConfigurationError, match=r"there is no tokenizer, which is one of tokenizer\.json, vocab\.txt, "
    ):
        load(broken)


def test_an_encoders_adapter_is_refused(bert: Path, tmp_path: Path) -> None:
    told = {"peft_type": "LORA", "r": 2, "target_modules": ["query"], "base_model_name_or_path": str(bert)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(told))
    with pytest.raises(ConfigurationError, match="reward model mood: an encoder's adapter is not supported; merge it"):
        load(tmp_path)


@pytest.mark.parametrize("sees", ["padding", "nothing"])
def test_an_architecture_that_cannot_score_texts_side_by_side_is_refused(
    sees: str, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that sees the padding beside a text, and one that needs more than a text has."""
    encoder = load(bert)
    forward = encoder._network.forward

    def careless(input_ids: torch.Tensor, **inputs: Any) -> Any:
        if sees == "nothing":
            raise ValueError("it needs the places of the words on the page")
        return forward(input_ids=input_ids)

    monkeypatch.setattr(encoder._network, "forward", careless)
    assert encoder.try_padding().startswith("a trial run ")


def test_code_of_an_encoders_checkpoint_never_runs(broken: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (broken / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    auto = {"AutoConfig": "evil.Evil", "AutoModelForSequenceClassification": "evil.Evil"}
    edit_json(broken / "config.json", auto_map=auto)
    edit_json(broken / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    assert load(broken).info.family == "bert"
    assert not ran.exists()

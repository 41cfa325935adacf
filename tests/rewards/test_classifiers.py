"""Causal classifiers with several labels: which label counts, and its values and gradients against stock transformers,
finite differences and the plain loop."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from server.errors import ConfigurationError, InvalidRequest
from server.guidance.plain import PlainLoop, PlainReward
from server.rewards.classifier import find_classifier
from server.rewards.graphs import GraphedPasses, differentiate
from server.rewards.reward_model import RewardModel
from server.types import RewardOutput
from tests.support import models
from tests.support.graphs import again
from tests.support.jobs import make_job, run
from tests.support.lora import WEIGHTS, write_adapter
from tests.support.models import GOLDEN, load_reward
from tests.support.rewards import FAMILIES, edit_json, embeddings, exact_norms, load_stock, write_reward_model

TOPICS = {0: "code", 1: "law", 2: "7", 3: "music", 4: "sport"}
LABELS = {"llama": 5, "qwen2": 2, "mistral": 5, "gemma": 2, "gpt2": 5}
RESPONSE_ALONE = "<|im_start|>{{ messages[-1]['content'] }}"
"""As for a classifier of texts, which knows no turns."""
SEQUENCES = [[5, 6, 7, 8], [9, 300, 4], [17] * 30, [41, 3]]
LOG_SOFTMAX = {"label": 0, "output": "log_softmax"}
OUTPUTS: tuple[RewardOutput, ...] = ("logit", "log_softmax")


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A random classifier, and transformers' own of it in float64."""
    folder = tmp_path_factory.mktemp(request.param) / "rm"
    template = RESPONSE_ALONE if request.param == "gpt2" else ""
    write_reward_model(folder, request.param, num_labels=LABELS[request.param], template=template)
    stock = load_stock(folder)
    exact_norms(stock)
    return folder, stock


def load(folder: Path, label: int, output: RewardOutput) -> RewardModel:
    """Ours in float64."""
    model = load_reward(folder=folder, label=label, output=output)
    exact_norms(model._network)
    return model


@pytest.fixture(scope="module")
def topics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with five named labels."""
    return write_reward_model(tmp_path_factory.mktemp("topics") / "rm", "llama", num_labels=5, id2label=TOPICS)


def expected(logits: Tensor, output: RewardOutput, label: int) -> Tensor:
    return (logits if output == "logit" else torch.log_softmax(logits, -1))[..., label]


@pytest.mark.parametrize("output", OUTPUTS)
def test_every_labels_score_is_stock_transformers(checkpoint: tuple[Path, Any], output: RewardOutput) -> None:
    folder, stock = checkpoint
    logits = torch.cat([stock(input_ids=torch.tensor([ids])).logits for ids in SEQUENCES])
    for label in range(logits.shape[1]):
        found = load(folder, label, output).score(SEQUENCES)
        torch.testing.assert_close(found, expected(logits, output, label), rtol=0, atol=1e-10)


def read_with_gradient(model: RewardModel, embeds: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards (2,) and their gradient, of a row of 5 tokens behind a prefix and one of 3 without."""
    layout = model.layout([model.prefill([5, 9, 30]), model.prefill([])], [5, 3])
    return differentiate(model, layout, embeds)


@pytest.mark.parametrize("output", OUTPUTS)
def test_gradients_are_finite_differences(checkpoint: tuple[Path, Any], output: RewardOutput) -> None:
    model = load(checkpoint[0], 1, output)
    embeds = 0.3 * embeddings(model, 8)
    _, g = read_with_gradient(model, embeds)
    for seed in range(3):
        along = embeddings(model, 8, seed + 10)
        ahead, behind = (read_with_gradient(model, embeds + step * along)[0].sum() for step in (1e-5, -1e-5))
        torch.testing.assert_close((ahead - behind) / 2e-5, (g * along).sum(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("output", OUTPUTS)
def test_straight_lines_and_graphs_in_float32_are_autograds_in_float64(topics: Path, output: RewardOutput) -> None:
    double, single = (
        load_reward(dtype=each, folder=topics, label=3, output=output) for each in (torch.float64, torch.float32)
    )
    embeds = 0.3 * embeddings(double, 8)
    wanted = read_with_gradient(double, embeds)
    found = read_with_gradient(single, embeds.float())
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-4)
    single.attention_backend = "reference"
    layout = single.layout([single.prefill([5, 9, 30])], [8])
    layout = layout.hiding(torch.tensor([6]), layout.positions)
    replayed = GraphedPasses(single, again).run(layout, embeds.float())
    for one, other in zip(replayed, differentiate(single, layout, embeds.float()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("output", OUTPUTS)
def test_the_engine_follows_the_plain_loop(checkpoint: tuple[Path, Any], output: RewardOutput) -> None:
    """Token for token in float64."""
    folder, stock = checkpoint
    golden = models.pair("dream")
    ours = load(folder, 1, output)
    rewards = {"rm": PlainReward(stock, ours.tokenizer, ours.table, ours.padding, 1, output)}
    plain = PlainLoop(golden.loaded.model, golden.loaded.tokenizer, golden.loaded.info, rewards)
    job = make_job(prompt="Hi", tokenizer=golden.loaded.tokenizer, method="entrgi", best_of=2, gradient_steps=2, seed=5)
    got, wanted = run(golden, [job], rewards={"rm": ours})[job.id], plain.run(job)
    assert [list(one.token_ids) for one in got.trajectories] == wanted.token_ids
    assert [one.reward for one in got.trajectories] == pytest.approx(wanted.rewards, abs=1e-9)


def test_a_template_that_writes_the_response_alone_is_refused(tmp_path: Path) -> None:
    """An empty response would be no token."""
    folder = write_reward_model(tmp_path, "gpt2", template="{{ messages[-1]['content'] }}")
    with pytest.raises(ConfigurationError, match="reward model rm: chat_template: it writes the response alone"):
        load_reward(folder=folder)


def test_a_row_past_the_last_learned_position_is_refused_by_the_limit(tmp_path: Path) -> None:
    """Rotations have no end, as another test holds."""
    model = load_reward(folder=write_reward_model(tmp_path, "gpt2"))
    assert model.score([[5] * 512]).isfinite().all()
    with pytest.raises(InvalidRequest, match="takes 513 tokens; reward model rm reads 512 at most") as raised:
        model.score([[5], [5] * 513])
    assert raised.value.param == "max_tokens"


@pytest.mark.parametrize(
    ("label", "index"), [("law", 1), (1, 1), ("1", 1), ("7", 2), (2, 2), ("4", 4)], ids=lambda value: repr(value)
)
def test_a_label_is_named_by_its_name_or_else_by_its_number(topics: Path, label: int | str, index: int) -> None:
    found = find_classifier("rm", topics, label)
    assert (found.reading.index, found.reading.label) == (index, TOPICS[index])


@pytest.mark.parametrize(
    ("reads", "config", "words"),
    [
        ({}, {}, r"label: name one of its 5 labels: 0 \('code'\), 1 \('law'\), 2 \('7'\), 3 \('music'\), 4 \('spo"),
        ({"label": "Law"}, {}, r"label: there is no 'Law'; the labels are 0 \('code'\), 1"),
        ({"label": 5}, {}, "label: there is no 5;"),
        ({"label": -1}, {}, "label: there is no -1;"),
        ({"label": "5"}, {}, "label: there is no '5';"),
        ({"label": 0, "reads": "pair"}, {}, "input: is for encoders"),
        (LOG_SOFTMAX, {"problem_type": "multi_label_classification"}, "output: log_softmax is for labels that excl"),
        (LOG_SOFTMAX, {"problem_type": "regression"}, "output: log_softmax is for labels that exclude each other, and"),
        ({"label": 0}, {"id2label": {"0": "a", "1": "b"}}, "num_labels: config.json tells of 2 labels, the head has 5"),
        ({"label": 0}, {"id2label": {"0": "a", "one": "b"}}, "id2label: must name the labels by number"),
        ({"label": 0}, {"id2label": ["a", "b"]}, "id2label: must name the labels by number"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_reward_is_refused_by_its_key(
    topics: Path, reads: dict[str, Any], config: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(topics, tmp_path / "rm"))
    edit_json(folder / "config.json", **config)
    with pytest.raises(ConfigurationError, match=f"^reward model rm: {words}"):
        find_classifier("rm", folder, **reads)


def test_one_label_needs_no_name_and_has_no_log_softmax() -> None:
    golden = GOLDEN / "dream-tiny/rm"
    for label in (None, 0, "LABEL_0"):
        assert find_classifier("rm", golden, label).reading.label is None
    with pytest.raises(ConfigurationError, match="output: log_softmax of one label is always 0"):
        find_classifier("rm", golden, output="log_softmax")


def test_labels_without_names_and_of_several_regressions(topics: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(topics, tmp_path / "rm"))
    edit_json(folder / "config.json", id2label=None, label2id=None, problem_type="regression")
    nameless, named = load_reward(folder=folder, label="LABEL_3"), load_reward(folder=topics, label="music")
    assert torch.equal(nameless.score(SEQUENCES), named.score(SEQUENCES))
    assert (nameless.info.label, named.info.label) == ("LABEL_3", "music")


def test_an_adapter_may_bring_a_head_with_several_labels(tmp_path: Path) -> None:
    base = GOLDEN / "dream-tiny/rm"
    kept = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"], "base_model_name_or_path": str(base)}
    adapter = write_adapter(tmp_path / "adapter", base, **kept)
    head = torch.randn(3, 48, generator=torch.Generator().manual_seed(3))
    whole = load_file(adapter / WEIGHTS) | {"base_model.model.score.weight": head}
    save_file(whole, adapter / WEIGHTS)
    with pytest.raises(ConfigurationError, match=r"label: name one of its 3 labels: 0 \('LABEL_0'\)"):
        load_reward(folder=adapter)
    single = {"base_model.model.score.weight": head[2:]}
    save_file(whole | single, adapter / WEIGHTS)
    alone = load_reward(folder=adapter).score(SEQUENCES)
    save_file(whole, adapter / WEIGHTS)
    other = Path(shutil.copytree(base, tmp_path / "base"))
    edit_json(other / "config.json", problem_type="multi_label_classification")
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(other))
    with pytest.raises(ConfigurationError, match="output: log_softmax is for labels that exclude each other"):
        find_classifier("rm", adapter, 2, "log_softmax")
    torch.testing.assert_close(load_reward(folder=adapter, label=2).score(SEQUENCES), alone, rtol=0, atol=1e-12)

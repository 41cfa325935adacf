"""Devices: which one the reward models are on, and, where there is a GPU, the same work on it in every way."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from demo import bundled_model_path, bundled_reward_models
from demo.train_dlm import initialise
from kernels.recording import recorder
from kernels.varlen import unavailable
from server.errors import ConfigurationError
from server.guidance.steer import Steered
from server.models import graphs
from server.models.acceleration import accelerate, graph_trunk
from server.models.dream import DreamModel
from server.models.graphs import GraphedTrunk
from server.models.layers import DecoderConfig
from server.models.packing import PackedLayout
from server.models.padding import shape_of
from server.rewards.graphs import GraphedPasses
from server.types import JobResult
from server.wire.config import RewardSource, WorkerConfig
from server.worker import inner
from server.worker.service import LoadedService, load
from tests.support.jobs import finish, make_job
from tests.support.kernels import choose_kernels
from tests.support.models import GOLDEN, diffusion, reward

FILES = GOLDEN / "llada-tiny"
CONFIG = WorkerConfig(
    str(FILES / "dlm"),
    device="cpu",
    dtype="float64",
    reward_models=(RewardSource("rm", str(FILES / "rm")),),
    vocab_fallback="zero",
)
BUNDLED_REWARD = RewardSource("rm", str(next(iter(bundled_reward_models().values()))))
BUNDLED = replace(CONFIG, model=str(bundled_model_path()), reward_models=(BUNDLED_REWARD,))


def gpu(test: Any) -> Any:
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


# -- on any machine ---------------------------------------------------------------------------------------------------


def test_the_table_is_with_the_logits_and_everything_else_with_the_model() -> None:
    """`meta` stands for the other device: what is computed there has a shape and no values."""
    model = reward("llada", vocab_fallback="zero", table_device=torch.device("meta"))
    assert model.table.shape == (diffusion("llada").model.vocab_size, model.hidden_size)
    assert (model.table.device.type, model.device.type) == ("meta", "cpu")
    prefix = model.prefill([5, 6, 7])
    assert {key.device.type for key in prefix.keys} == {"cpu"}
    # On the way out only: nothing that is on `meta` can come back.
    layout = model.layout([prefix], [2])
    assert model.read(layout, model.own_embeddings(torch.tensor([8, 9]))).device.type == "cpu"


def rewarded(config: WorkerConfig) -> JobResult:
    """A guided job on a service of its own."""
    return answered(load(config))


def answered(service: LoadedService) -> JobResult:
    """A guided job."""
    values = {"max_tokens": 12, "best_of": 3, "seed": 5, "method": "entrgi"}
    job = make_job("one", "Hello there", service.runner.loaded.tokenizer, **values)
    return finish(service.runner, [job])[0]["one"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_weights_on_a_cpu_cost_no_accuracy(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """The bundled weights are stored in bfloat16: kept so, with arithmetic in float32, they give what they give when
    they are widened at loading."""
    choose_kernels(monkeypatch, BFLOAT16="0")
    narrow, wide = (rewarded(replace(BUNDLED, dtype=each)) for each in (dtype, "float32"))
    for a, b in zip(narrow.trajectories, wide.trajectories, strict=True):
        assert a.token_ids == b.token_ids
        assert a.reward == pytest.approx(b.reward, abs=1e-4)


# -- with a GPU -------------------------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("rewards", ["cuda", "cpu"])
def test_the_gpu_gives_the_tokens_of_the_cpu(rewards: str) -> None:
    """In float64, with the reward models beside the diffusion model and on another device."""
    expected = rewarded(CONFIG)
    got = rewarded(replace(CONFIG, device="cuda", reward_device=rewards))
    for a, b in zip(got.trajectories, expected.trajectories, strict=True):
        assert a.token_ids == b.token_ids
        assert a.reward == pytest.approx(b.reward, abs=1e-9)


@gpu
@pytest.mark.parametrize("graphs", [False, True])
def test_inner_steps_never_wait_for_the_device(monkeypatch: pytest.MonkeyPatch, graphs: bool) -> None:
    """Torch counts every wait as an error between the first inner step and the last. On a CPU
    tests/rewards/test_no_waits.py looks for the same."""
    config = replace(BUNDLED, device="cuda", dtype="bfloat16")
    if reason := unavailable("varlen", torch.device("cuda"), torch.bfloat16, 24):
        pytest.skip(f"varlen: {reason}")
    service = load(replace(config, attention_backend="varlen", cuda_graphs=graphs))
    model = service.runner.reward_models["rm"]
    answered(service)  # kernels, workspaces, page-locked memory, recordings
    if graphs:
        assert isinstance(model.graphed_passes, GraphedPasses)
        assert len(model.graphed_passes.recorded.held) >= 2  # that of the trial run and others
    steer, calls = inner.steer, []

    def strict(*args: Any, **options: Any) -> Steered:
        calls.append(args)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return steer(*args, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(inner, "steer", strict)
    result = answered(service)
    assert calls
    assert all(math.isfinite(trajectory.reward or math.nan) for trajectory in result.trajectories)


@pytest.fixture
def dream() -> DreamModel:
    """Random weights with heads of 64 channels, in bfloat16 on the GPU."""
    config = DecoderConfig(
        hidden=256, intermediate=512, heads=4, key_heads=2, head_size=64, layers=3,
        vocab_size=1000, mask_token_id=0,
    )  # fmt: skip
    model = DreamModel(config)
    initialise(model, seed=1)
    return model.requires_grad_(False).eval().to("cuda", torch.bfloat16)


def batches(device: str) -> Iterator[tuple[torch.Tensor, PackedLayout, torch.Tensor]]:
    """Ragged batches, some of them in one bucket."""
    generator = torch.Generator().manual_seed(3)
    for lengths in ([20], [21, 9], [22, 8], [20, 20, 20], [70, 3, 90, 11], [71, 2, 88, 12], [20]):
        tokens = torch.randint(0, 1000, (sum(lengths),), generator=generator).to(device)
        rows = torch.arange(0, sum(lengths), 2).to(device)
        yield tokens, PackedLayout.of(lengths, device), rows


def test_the_batches_below_fall_into_three_buckets() -> None:
    assert len({shape_of(layout) for _, layout, _ in batches("cpu")}) == 3


@gpu
@pytest.mark.parametrize("backend", ["auto", "varlen", "sdpa"])
@pytest.mark.parametrize("way", ["plain", "compile", "cuda_graphs"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@torch.no_grad()
def test_every_way_to_run_the_trunk_gives_the_same_states(dream: DreamModel, way: str, backend: str) -> None:
    exact = DreamModel(dream.config)
    exact.load_state_dict({name: weight.cpu() for name, weight in dream.state_dict().items()})
    exact.double()
    if backend == "sdpa" and way == "compile":
        with pytest.raises(ConfigurationError, match="needs the attention backend varlen"):
            accelerate(dream, 2048, backend, compiled=True)
        return
    accelerate(dream, 2048, backend, compiled=way == "compile")
    if way == "cuda_graphs":
        assert graph_trunk(dream) == ("they need the attention backend varlen, not sdpa" if backend == "sdpa" else "")
    for tokens, layout, rows in batches("cuda"):
        got = dream.hidden(tokens, layout, rows).double().cpu()
        expected = exact.hidden(tokens.cpu(), PackedLayout.of(layout.lengths), rows.cpu())
        assert (got - expected).norm() <= 0.02 * expected.norm()
    if way == "cuda_graphs" and backend != "sdpa":
        assert isinstance(dream.trunk, GraphedTrunk)
        assert len(dream.trunk.recorded.held) == 3  # the trial run's is one of them


@gpu
@torch.no_grad()
def test_graphs_are_bounded_and_what_they_return_stays(dream: DreamModel, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerate(dream, 2048)
    plain = [dream.hidden(*batch) for batch in batches("cuda")]
    monkeypatch.setattr(graphs, "MOST_TOKENS", 128)
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 1)
    dream.trunk = graphed = GraphedTrunk(dream.plain_trunk, recorder(dream.device))
    kept = [dream.hidden(*batch) for batch in batches("cuda")]
    assert len(graphed.recorded.held) == 1
    for got, expected in zip(kept, plain, strict=True):
        assert (got.double() - expected.double()).norm() <= 0.01 * expected.double().norm()


@gpu
@torch.no_grad()
@pytest.mark.parametrize("graphs", [False, True])
def test_a_forward_never_waits_for_the_device(dream: DreamModel, graphs: bool) -> None:
    accelerate(dream, 2048, "varlen")
    assert not graphs or graph_trunk(dream) == ""
    prepared = list(batches("cuda"))
    for batch in prepared:
        dream.masked_logits(*batch)  # tables, workspaces, recordings
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for tokens, layout, rows in prepared:
            dream.masked_logits(tokens, PackedLayout.of(layout.lengths, "cuda"), rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")

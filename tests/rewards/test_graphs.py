"""Passes of reward models on padded shapes, as CUDA graphs replay them: same rewards, same gradients. Without a GPU the
same function runs again on the same memory in place of a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.checkpoints import Shape
from benchmarks.reward_passes import Setup, measure_passes
from kernels import varlen
from server.models import graphs
from server.models.packing import EMPTY_PREFIX, PackedLayout, Prefix
from server.models.padding import shape_of
from server.rewards.graphs import GraphedPasses, differentiate, graph_passes, worst_difference
from server.rewards.reward_model import RewardModel
from server.rewards.trunk import Wrapped
from tests.support.graphs import again, stale
from tests.support.models import CPU, load_reward
from tests.support.rewards import EOS, PAD, Pass, contexts, embeddings


@pytest.fixture
def _careless_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention that leaves what it likes in the gradients of keys that no query asked for."""

    def attend(q: Tensor, k: Tensor, v: Tensor, spans: varlen.Spans, causal: bool, scale: float | None) -> Tensor:
        asked = torch.zeros(len(k), dtype=torch.bool)
        keys = spans.cu_k.tolist()
        for index, count in enumerate(spans.cu_q.diff().tolist()):
            asked[keys[index] : keys[index + 1]] = bool(count)
        for x in (k, v):
            if x.requires_grad:
                x.register_hook(lambda g: torch.where(asked[:, None, None], g, torch.nan))
        return varlen.reference(q, k, v, spans, causal, scale)

    monkeypatch.setitem(varlen._IMPLEMENTATIONS, "reference", attend)


@pytest.fixture(scope="module")
def model() -> RewardModel:
    return load_reward(attention="reference")


def rows_of(
    model: RewardModel, prefixes: list[Prefix], lengths: list[int], visible: list[int], seed: int
) -> tuple[PackedLayout, Tensor]:
    """Rows of which the first `visible` tokens count, and their embeddings."""
    layout = model.layout(prefixes, lengths)
    return layout.hiding(torch.tensor(visible), layout.positions), embeddings(model, sum(lengths), seed)


def assert_same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("_careless_kernel")
def test_padding_changes_no_reward_and_no_gradient(model: RewardModel) -> None:
    first, second = model.prefill(range(30, 47)), model.prefill(range(60, 65))
    (longer,) = model.extend(model.layout([first], [3]), model.own_embeddings(torch.tensor([5, 6, 8])))
    cases = [
        ([first, second, first], [9, 4, 12], [9, 1, 7]),
        ([longer, EMPTY_PREFIX, first, longer], [8, 8, 8, 1], [3, 8, 2, 1]),  # of the same bucket
        ([EMPTY_PREFIX], [5], [4]),  # nothing cached
        ([first, second, longer], [11, 3, 12], [1, 3, 11]),  # of the first bucket again, other links
        ([second] * 20, [30] * 20, [1 + i for i in range(20)]),
    ]
    passes = GraphedPasses(model, again)
    shapes = set()
    for seed, (prefixes, lengths, visible) in enumerate(cases):
        layout, embeds = rows_of(model, prefixes, lengths, visible, seed)
        assert passes.takes(layout)
        shapes.add(shape_of(layout))
        rewards, g = passes.run(layout, embeds)
        assert_same((rewards, g), differentiate(model, layout, embeds))
        assert g.isfinite().all()
    assert len(passes.recorded.held) == len(shapes) == 3


def test_passes_of_a_step_share_what_is_cached_and_read_what_is_new(model: RewardModel) -> None:
    """The inner steps of one denoising step: the same rows with other tokens hidden and other embeddings."""
    layout = model.layout([model.prefill(range(30, 50))] * 2, [7, 5])
    passes = GraphedPasses(model, again)
    seen = []
    for seed, visible in enumerate(([7, 5], [2, 5], [6, 1])):
        hiding = layout.hiding(torch.tensor(visible), layout.positions)
        embeds = embeddings(model, 12, seed)
        got = passes.run(hiding, embeds)
        assert_same(got, differentiate(model, hiding, embeds))
        seen.append(got[0])
    assert len(passes.recorded.held) == 1
    assert len({tuple(rewards.tolist()) for rewards in seen}) == 3


def test_inputs_that_were_filled_in_part_are_filled_again(model: RewardModel) -> None:
    prefix, passes = model.prefill(range(30, 50)), GraphedPasses(model, again)
    for lengths in [7, 5], [4, 8]:
        layout, embeds = rows_of(model, [prefix] * 2, lengths, [3, 4], 0)
        with pytest.raises(RuntimeError):
            passes.run(replace(layout, cu_k=layout.cu_k[:2]), embeds)
        assert_same(passes.run(layout, embeds), differentiate(model, layout, embeds))
    assert len(passes.recorded.held) == 1


def test_keys_that_are_laid_out_count_as_a_share_of_a_token(model: RewardModel) -> None:
    passes, prefix = GraphedPasses(model, again), model.prefill(range(30, 290))
    layout, _ = rows_of(model, [prefix] * 6, [40] * 6, [40] * 6, 0)
    assert passes.takes(layout)  # 240 own tokens, and 1,560 keys before them
    passes.recorded.key_share = 0.9
    assert passes.takes(layout)
    passes.recorded.most_tokens = 1024
    assert not passes.takes(layout)


def test_what_is_too_large_or_hides_nothing_is_not_taken(model: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST_TOKENS", 256)
    monkeypatch.setattr("server.rewards.graphs.MOST_CACHED", 256)
    passes = GraphedPasses(model, again)
    prefix = model.prefill(range(30, 290))
    assert passes.takes(rows_of(model, [EMPTY_PREFIX], [200], [60], 0)[0])
    assert not passes.takes(rows_of(model, [EMPTY_PREFIX] * 2, [200, 60], [60, 40], 0)[0])
    assert not passes.takes(rows_of(model, [prefix], [6], [6], 0)[0])  # cached tokens
    assert not passes.takes(model.layout([EMPTY_PREFIX], [60]))  # none hidden: nothing that the loop would ask for


@pytest.fixture
def _garbage() -> Iterator[None]:
    """Memory that torch hands out holds NaN until it is written, as a graph's pool holds what other graphs left."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_garbage")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_a_graph_reads_nothing_but_its_inputs(dtype: torch.dtype, tolerance: float) -> None:
    model = load_reward(dtype=dtype, attention="reference")
    passes = GraphedPasses(model, again)
    kept = []
    for seed, lengths in enumerate(([7, 12, 5], [9, 3], [8, 30, 2], [7, 12, 5])):
        prefix = model.prefill(range(30 + seed, 50))
        embeds = embeddings(model, sum(lengths), seed).to(dtype)
        layout = model.layout([prefix] * len(lengths), lengths)
        layout = layout.hiding(torch.tensor(lengths) - 1, layout.positions)
        kept.append((passes.run(layout, embeds), differentiate(model, layout, embeds)))
    for got, expected in kept:  # whatever has been replayed since
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_the_gradient_loop_uses_them(model: RewardModel) -> None:
    rng = np.random.default_rng(2)
    canvases = [rng.integers(20, 500, 10) for _ in range(3)]
    canvases[1][4], canvases[2][5] = EOS, PAD
    one, embeds = Pass(model, contexts(model, 3), canvases, [np.arange(2, 10)] * 3), embeddings(model, 24)
    expected = one.read(embeds)
    passes = GraphedPasses(model, again)
    model.graphed_passes = passes
    try:
        got = one.read(embeds)
        unasked = one.read(embeds, gradient=False)
    finally:
        model.graphed_passes = None
    assert len(passes.recorded.held) == 1
    assert_same(got, expected)
    torch.testing.assert_close(unasked[0], expected[0], rtol=1e-9, atol=1e-11)
    assert not unasked[1].any()


def test_the_trial_run_believes_what_is_right_and_nothing_else(model: RewardModel) -> None:
    assert worst_difference(model, GraphedPasses(model, again)) < 1e-9
    assert worst_difference(model, GraphedPasses(model, stale)) > 0.05
    poison = [torch.full((16,), torch.nan), torch.full((32, model.hidden_size), torch.nan)]
    off = worst_difference(model, GraphedPasses(model, lambda function: lambda: (function(), tuple(poison))[1]))
    assert not off <= 0.05


def test_the_measurement_runs_both_ways() -> None:
    setup = Setup(Shape(1024, 32, 2, 2, 64), "float64", rows=(1, 3), tokens=9, cached=5, repeats=1)
    figures = measure_passes(CPU, setup, lambda model: GraphedPasses(model, again), "reference")
    assert [entry["rows"] for entry in figures] == [1, 3]
    assert all(entry[way] > 0 for entry in figures for way in ("kernels", "graphs", "gain"))


def test_a_model_that_cannot_have_them_says_why_and_runs_without() -> None:
    model = load_reward(attention="reference")
    assert graph_passes(model) == "there are none on cpu"

    def broken(function: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
        raise RuntimeError("capture failed\nfor some reason")

    assert graph_passes(model, broken) == "a trial run failed: capture failed; for some reason"
    assert graph_passes(model, stale).startswith("a trial run was off by")
    model._trunk = Wrapped(model._network.model)
    assert graph_passes(model) == "transformers runs its architecture"
    assert model.graphed_passes is None


def test_a_model_that_can_have_them_runs_so() -> None:
    model = load_reward(attention="reference")
    assert graph_passes(model, again) == ""
    assert isinstance(model.graphed_passes, GraphedPasses)

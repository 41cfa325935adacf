"""Passes of reward models on padded shapes, as CUDA graphs replay them: same rewards, same gradients. Without a GPU the
same function runs again on the same memory in place of a graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.checkpoints import Shape
from benchmarks.reward_passes import Setup, measure_passes
from kernels import varlen
from kernels.recording import bucket
from server.errors import ConfigurationError
from server.guidance.assembly import HiddenBehind, Objective, Responses, Timings
from server.guidance.prefixes import RewardContext
from server.guidance.steer import visible_positions
from server.rewards.attention import EMPTY_PREFIX, Packing
from server.rewards.graphs import GraphedPasses, Pass, differentiate, graph_passes, worst_difference
from server.rewards.padding import Arena, cached_tokens, pad, shape_of
from server.rewards.reward_model import Prefix, RewardModel, RewardRows, load_reward_model
from server.rewards.varlen import VarlenRows
from server.text.template import split_at_response
from server.text.tokenizer import Tokenizer
from server.types import Message

GOLDEN = Path(__file__).parents[1] / "golden/dream-tiny"
EOS, PAD = 7, 9
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("exact_qwen3_norms")


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
    loaded = load_reward_model(
        "rm", GOLDEN / "rm", diffusion_tokenizer=Tokenizer.load(GOLDEN / "dlm"), diffusion_vocab_size=520,
        dtype=torch.float64, device=CPU,
    )  # fmt: skip
    loaded.attention_backend = "reference"
    return loaded


class Again:
    """In place of a graph."""

    def __init__(self, function: Callable[[], Pass]) -> None:
        self.replay = function


def rows_of(
    model: RewardModel, prefixes: list[Prefix], lengths: list[int], visible: list[int], seed: int
) -> tuple[Packing, Tensor, Tensor]:
    """Packed rows of which the first `visible` tokens count, their positions and embeddings."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.cat([torch.arange(n) + prefix.length for n, prefix in zip(lengths, prefixes, strict=True)])
    embeds = torch.randn(len(positions), model.hidden_size, dtype=torch.float64, generator=generator)
    return model.packing(prefixes, lengths).hiding(torch.tensor(visible)), positions, embeds


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 60)), min_size=1, max_size=40),
    prefix=st.integers(1, 90),
)
def test_padded_rows_have_exactly_their_buckets_shape(rows: list[tuple[int, int]], prefix: int) -> None:
    keys = (torch.zeros(1, prefix, 2),)
    cached = Prefix(prefix, keys, keys)
    longer = Prefix(prefix + 3, (torch.zeros(1, 3, 2),), (torch.zeros(1, 3, 2),), cached)
    prefixes = [(EMPTY_PREFIX, cached, longer)[which] for which, _ in rows]
    lengths = [length for _, length in rows]
    visible = [1 + length // 2 for length in lengths]
    packing = Packing.of(prefixes, lengths, CPU, backend="reference").hiding(torch.tensor(visible))
    assert isinstance(packing.varlen, VarlenRows)
    shape = shape_of(packing.varlen)
    tokens = sum(lengths)
    inputs = pad(packing, torch.arange(tokens), torch.ones(tokens, 5), shape)
    assert inputs.embeds.shape == (shape.tokens, 5)
    assert len(inputs.positions) == len(inputs.hidden) == shape.tokens
    assert len(inputs.lasts) == shape.rows
    assert len(inputs.cu_q) == len(inputs.cu_k) == shape.rows + 1
    assert len(inputs.last_cu_k) == 2 * shape.rows + 1
    assert len(inputs.gather) == shape.keys
    assert cached_tokens(packing.varlen) <= shape.cached
    assert int(inputs.gather.max()) < shape.cached + shape.tokens
    own, seen = inputs.cu_q.diff().tolist(), inputs.cu_k.diff().tolist()
    assert own[: len(rows)] == lengths
    assert own[len(rows) :] == seen[len(rows) :]  # rows that fill up have no prefix,
    assert min(own) >= 1  # but a token
    assert sum(own) == shape.tokens
    assert max(own) <= shape.longest
    assert max(seen) <= shape.longest_keys
    assert sum(seen) <= shape.keys
    ends = inputs.cu_q[1:].tolist()
    assert inputs.lasts[len(rows) :].tolist() == [end - 1 for end in ends[len(rows) :]]
    every = (shape.rows, shape.tokens, shape.longest, shape.keys, shape.longest_keys, shape.cached)
    assert all(size == bucket(size) for size in every)
    assert shape.tokens <= 1.5 * (tokens + shape.rows - len(rows))
    assert shape.rows <= max(16, 4 * (len(rows) + 1))


def test_few_shapes_serve_many_steps() -> None:
    """Responses of up to 64 tokens in any state of four conversations' trajectories, 12 to 16 of them at a time."""
    rng = np.random.default_rng(4)
    shapes = set()
    for _ in range(300):
        lengths = rng.integers(70, 200, 4)
        keys = [(torch.empty(1, int(length), 2),) for length in lengths]
        conversations = [Prefix(int(length), key, key) for length, key in zip(lengths, keys, strict=True)]
        prefixes, own = [], []
        for index in range(rng.integers(12, 17)):
            parent, settled = conversations[index % 4], int(rng.integers(1, 64))
            grown = (torch.empty(1, settled, 2),)
            prefixes.append(Prefix(parent.length + settled, grown, grown, parent))
            own.append(64 - settled + 5)
        shapes.add(shape_of(VarlenRows.of(prefixes, own, CPU, "reference")))
    assert len(shapes) <= 40


@pytest.mark.usefixtures("_careless_kernel")
def test_padding_changes_no_reward_and_no_gradient(model: RewardModel) -> None:
    first, second = model.prefill(range(30, 47)), model.prefill(range(60, 65))
    (longer,) = model.extend(
        RewardRows((first,), (3,), torch.tensor([17, 18, 19])), model.own_embeddings(torch.tensor([5, 6, 8]))
    )
    cases = [
        ([first, second, first], [9, 4, 12], [9, 1, 7]),
        ([longer, EMPTY_PREFIX, first, longer], [8, 8, 8, 1], [3, 8, 2, 1]),  # of the same bucket
        ([EMPTY_PREFIX], [5], [4]),  # nothing cached
        ([first, second, longer], [11, 3, 12], [1, 3, 11]),  # of the first bucket again, other links
        ([second] * 20, [30] * 20, [1 + i for i in range(20)]),
    ]
    passes = GraphedPasses(model, Again)
    shapes = set()
    for seed, (prefixes, lengths, visible) in enumerate(cases):
        packing, positions, embeds = rows_of(model, prefixes, lengths, visible, seed)
        assert passes.takes(packing)
        assert isinstance(packing.varlen, VarlenRows)
        shapes.add(shape_of(packing.varlen))
        rewards, g = passes.run(packing, positions, embeds)
        expected, expected_g = differentiate(model, packing, positions, embeds)
        torch.testing.assert_close(rewards, expected, rtol=0, atol=1e-11)
        torch.testing.assert_close(g, expected_g, rtol=1e-9, atol=1e-12)
        assert g.isfinite().all()
    assert passes.graphs == len(shapes) == 3


def test_passes_of_a_step_share_what_is_cached_and_read_what_is_new(model: RewardModel) -> None:
    """The inner steps of one denoising step: the same packing with other tokens hidden and other embeddings."""
    prefix = model.prefill(range(30, 50))
    packing = model.packing([prefix] * 2, [7, 5])
    assert isinstance(packing.varlen, VarlenRows)
    positions = torch.cat([torch.arange(7), torch.arange(5)]) + 20
    passes = GraphedPasses(model, Again)
    seen = []
    for seed, visible in enumerate(([7, 5], [2, 5], [6, 1])):
        hiding = packing.hiding(torch.tensor(visible))
        generator = torch.Generator().manual_seed(seed)
        embeds = torch.randn(12, model.hidden_size, dtype=torch.float64, generator=generator)
        got, expected = passes.run(hiding, positions, embeds), differentiate(model, hiding, positions, embeds)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        seen.append(got[0])
    assert passes.graphs == 1
    assert len({tuple(rewards.tolist()) for rewards in seen}) == 3


def test_graphs_are_bounded_and_what_they_return_stays(model: RewardModel) -> None:
    passes = GraphedPasses(model, Again, most_graphs=2)
    results = []
    for repeat in range(2):
        for length in (5, 40, 70):
            packing, positions, embeds = rows_of(model, [EMPTY_PREFIX], [length], [length], repeat)
            expected = differentiate(model, packing, positions, embeds)
            results.append((passes.run(packing, positions, embeds), expected))
    assert passes.graphs == 2
    for got, expected in results:
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_what_is_too_large_or_of_another_attention_is_not_taken(model: RewardModel) -> None:
    passes = GraphedPasses(model, Again, most_tokens=256)
    prefix = model.prefill(range(30, 290))
    assert passes.takes(rows_of(model, [EMPTY_PREFIX], [200], [60], 0)[0])
    assert not passes.takes(rows_of(model, [EMPTY_PREFIX] * 2, [200, 60], [60, 40], 0)[0])
    assert not passes.takes(rows_of(model, [prefix], [6], [6], 0)[0])  # cached tokens
    assert not passes.takes(model.packing([EMPTY_PREFIX], [60]))  # none hidden: nothing that the loop would ask for
    assert not passes.takes(Packing.of([EMPTY_PREFIX], [60], CPU, backend="sdpa"))
    with pytest.raises(ValueError, match="only rows with hidden tokens"):
        passes.run(model.packing([EMPTY_PREFIX], [6]), torch.arange(6), torch.zeros(6, model.hidden_size).double())


def test_the_gradient_loop_uses_them(model: RewardModel) -> None:
    before, after = split_at_response(model.tokenizer, (Message("user", "Hello"),))
    context = RewardContext.of(model.prefill(before), after)
    rng = np.random.default_rng(2)
    canvases = [rng.integers(20, 500, 10) for _ in range(3)]
    canvases[1][4], canvases[2][5] = EOS, PAD
    responses = Responses.of(canvases, [np.arange(2, 10)] * 3, CPU, eos_token_id=EOS, pad_token_id=PAD)
    visible = visible_positions(responses.committed, responses.first, EOS, PAD)
    embeds = torch.randn(24, model.hidden_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assembly = HiddenBehind(Objective(model, (context,) * 3, torch.ones(3, dtype=torch.float64)), responses)
    expected = assembly.read(embeds, visible, Timings(), gradient=True)
    passes = GraphedPasses(model, Again)
    model.graphed_passes = passes
    try:
        got = assembly.read(embeds, visible, Timings(), gradient=True)
        unasked = assembly.read(embeds, visible, Timings(), gradient=False)
    finally:
        model.graphed_passes = None
    assert passes.graphs == 1
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(unasked[0], expected[0], rtol=1e-9, atol=1e-11)
    assert not unasked[1].any()


def test_the_arena_copies_what_is_new_only(model: RewardModel) -> None:
    prefix = model.prefill(range(30, 50))
    arena = Arena(model.shape, 64, torch.float64, CPU)
    links = (prefix,)
    arena.hold(links)
    for mine, theirs in zip(arena.prefix(20).keys, prefix.keys, strict=True):
        assert torch.equal(mine, theirs)
    arena.prefix(20).keys[0].zero_()
    arena.hold(links)
    assert not arena.prefix(20).keys[0].any()
    arena.hold((prefix,))
    assert torch.equal(arena.prefix(20).keys[0], prefix.keys[0])
    assert torch.equal(arena.prefix(20).values[-1], prefix.values[-1])


def test_the_trial_run_believes_what_is_right_and_nothing_else(model: RewardModel) -> None:
    assert worst_difference(model, GraphedPasses(model, Again)) < 1e-9

    class Stale:
        """A graph that does not see what was written into its inputs."""

        def __init__(self, function: Callable[[], Pass]) -> None:
            self.result = function()

        def replay(self) -> Pass:
            return self.result

    assert worst_difference(model, GraphedPasses(model, Stale)) > 0.05


def test_the_measurement_runs_both_ways() -> None:
    setup = Setup(Shape(1024, 32, 2, 2, 64), "float64", rows=(1, 3), tokens=9, cached=5, repeats=1)
    figures = measure_passes(CPU, setup, lambda model: GraphedPasses(model, Again), "reference")
    assert [entry["rows"] for entry in figures] == [1, 3]
    assert all(entry[way] > 0 for entry in figures for way in ("kernels", "graphs", "gain"))


def test_where_there_are_none_is_refused_by_name(model: RewardModel) -> None:
    with pytest.raises(ConfigurationError, match="reward_cuda_graphs: there are none on cpu"):
        graph_passes(model)

"""What may stand in for a model's trunk gives the same states: padded to buckets, compiled, with another attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters

from kernels.recording import bucket
from server.errors import ConfigurationError
from server.models import graphs
from server.models.acceleration import accelerate, graph_trunk
from server.models.compiled import compiled_trunk
from server.models.graphs import GraphedTrunk
from server.models.packing import EMPTY_PREFIX, PackedLayout, Prefix
from server.models.padding import Arena, Inputs, cached_tokens, shape_of
from server.types import DecoderShape
from tests.support.graphs import again, stale
from tests.support.models import CPU, FAMILIES, diffusion, load_diffusion

LENGTHS = ([9], [20, 20, 20], [3, 17, 40, 8], [1, 1], [33] * 7, [5, 64, 5, 64, 12])


def model_of(family: str, dtype: torch.dtype = torch.float64) -> Any:
    return load_diffusion(family, dtype).model


def batch_of(model: Any, lengths: list[int], seed: int) -> tuple[torch.Tensor, PackedLayout, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, model.vocab_size, (sum(lengths),), generator=generator)
    rows = torch.randperm(len(tokens), generator=generator)[: max(1, len(tokens) // 2)].sort().values
    return tokens, PackedLayout.of(lengths), rows


def cached(length: int, parent: Prefix | None = None) -> Prefix:
    """A prefix of so many tokens more than its parent's."""
    return Prefix(length + (parent.length if parent else 0), torch.zeros(1, 2, 1, length, 2), parent)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 60)), min_size=1, max_size=40),
    prefix=st.integers(1, 90),
    hiding=st.booleans(),
)
def test_padded_rows_have_exactly_their_buckets_shape(rows: list[tuple[int, int]], prefix: int, hiding: bool) -> None:
    parent = cached(prefix)
    prefixes = [(EMPTY_PREFIX, parent, cached(3, parent))[which] for which, _ in rows]
    lengths = [length for _, length in rows]
    layout, tokens, real = PackedLayout.of(lengths, prefixes=prefixes, causal=True), sum(lengths), len(rows)
    if hiding:
        layout = layout.hiding(torch.tensor([1 + length // 2 for length in lengths]), layout.positions)
    shape = shape_of(layout)
    place = cached(shape.cached)
    inputs = Inputs(shape, torch.ones(0, 5), place, CPU)
    inputs.fill(torch.ones(tokens, 5), layout)
    padded = inputs.layout
    assert inputs.x.shape == (shape.tokens, 5)
    assert inputs.x[:tokens].all()
    assert len(padded.positions) == shape.tokens
    assert len(padded.cu_q) == len(padded.cu_k) == shape.rows + 1
    assert (padded.longest, padded.longest_keys) == (shape.longest, shape.longest_keys)
    own, seen = padded.cu_q.diff().tolist(), padded.cu_k.diff().tolist()
    assert own[:real] == lengths
    assert own[real:] == seen[real:]  # rows that fill up have no prefix,
    assert min(own) >= 1  # but a token
    assert sum(own) == shape.tokens
    assert max(own) <= shape.longest
    assert max(seen) <= shape.longest_keys
    if layout.gather is None:
        assert (shape.keys, shape.cached, padded.gather, padded.links) == (0, 0, None, ())
    else:
        assert padded.gather is not None
        assert padded.links == (place,)
        assert len(padded.gather) == shape.keys >= sum(seen)
        assert cached_tokens(layout) <= shape.cached
        assert int(padded.gather.max()) < shape.cached + shape.tokens
    if hiding:
        assert padded.visible is not None
        assert padded.visible.tolist() == [1 + length // 2 for length in lengths] + own[real:]
    sizes = (shape.rows, shape.tokens, shape.longest, shape.longest_keys, shape.keys, shape.cached)
    assert all(size in (0, bucket(size)) for size in sizes)
    assert shape.tokens <= 1.5 * (tokens + shape.rows - real)
    assert shape.rows <= max(16, 4 * (real + 1))


def test_few_shapes_serve_many_steps() -> None:
    """Canvases of a running server, and responses of up to 64 tokens in any state of four conversations'
    trajectories, 12 to 16 of them at a time."""
    rng = np.random.default_rng(4)
    canvases, responses = set(), set()
    for _ in range(300):
        canvases.add(shape_of(PackedLayout.of(rng.integers(60, 120, 12).tolist())))
        conversations = [cached(int(length)) for length in rng.integers(70, 200, 4)]
        prefixes, own = [], []
        for index in range(rng.integers(12, 17)):
            settled = int(rng.integers(1, 64))
            prefixes.append(cached(settled, conversations[index % 4]))
            own.append(64 - settled + 5)
        responses.add(shape_of(PackedLayout.of(own, prefixes=prefixes, causal=True)))
    assert len(canvases) <= 6
    assert len(responses) <= 40


def test_the_arena_copies_what_is_new_only() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second, third = (Prefix(n, torch.randn(3, 2, 2, n, 4, generator=generator)) for n in (20, 9, 5))
    arena = Arena(DecoderShape(8, 8, 2, 2, 4, 3), 64, torch.float32, CPU)

    def held(*links: Prefix) -> None:
        arena.hold(links)
        together = arena.prefix(sum(link.length for link in links))
        pieces = [link.both for link in links if link.both is not None]
        assert together.both is not None
        assert torch.equal(together.both, torch.cat(pieces, dim=3))

    held(first, second)
    assert first.both is not None
    first.both.zero_()  # is not read again, as long as it stays first
    arena.hold((first, third))
    assert arena.prefix(20).keys[0].any()
    held(third, first, second)
    held(first)


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_trunks_are_bounded_and_what_they_return_stays(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding changes no real row. `reference` reads nothing but what a recorded graph's kernel would: tokens,
    positions and cumulative lengths."""
    model = diffusion(family).model
    monkeypatch.setattr(model.model, "attention_backend", "reference")
    monkeypatch.setattr(graphs, "MOST_TOKENS", 256)
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    trunk = GraphedTrunk(model.plain_trunk, again)
    batches = [batch_of(model, lengths, 1) for lengths in (*LENGTHS, [300], *LENGTHS)]
    with torch.no_grad():
        kept = [trunk(*batch) for batch in batches]
        for batch, got in zip(batches, kept, strict=True):
            torch.testing.assert_close(got, model.plain_trunk(*batch), rtol=0, atol=1e-12)
        assert trunk(batches[0][0], batches[0][1], None).shape[0] == 9  # without rows it runs as it is
    assert len(trunk.recorded.held) == 2


def test_a_trunk_runs_in_graphs_once_a_trial_has_agreed() -> None:
    model = model_of("dream")
    assert graph_trunk(model) == "there are none on cpu"
    model.model.attention_backend = "reference"

    assert graph_trunk(model, stale).startswith("a trial run was off by")
    assert model.trunk == model.plain_trunk
    assert graph_trunk(model, again) == ""
    assert isinstance(model.trunk, GraphedTrunk)
    assert len(model.trunk.recorded.held) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_one_compiled_graph_serves_ragged_batches(family: str) -> None:
    """aot_eager is torch.compile's whole front end on ordinary kernels: what it traced, and how often."""
    model = model_of(family)
    torch._dynamo.reset()
    counters.clear()
    model.trunk = compiled_trunk(model.model, model.plain_trunk, backend="aot_eager")
    with torch.no_grad():
        for seed, lengths in enumerate(([11, 6, 6], *LENGTHS)):
            tokens, layout, rows = batch_of(model, lengths, seed)
            got = model.hidden(tokens, layout, rows)
            torch.testing.assert_close(got, model.plain_trunk(tokens, layout, rows), rtol=0, atol=1e-12)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.slow
def test_compiled_logits_equal_plain_ones() -> None:
    model = model_of("dream", torch.float32)
    torch._dynamo.reset()
    counters.clear()
    accelerate(model, model.context_length, compiled=True)
    plain = model_of("dream", torch.float32)
    with torch.no_grad():
        for seed, lengths in enumerate(LENGTHS):
            batch = batch_of(model, lengths, seed)
            expected = plain.masked_logits(*batch)
            torch.testing.assert_close(model.masked_logits(*batch), expected, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1


def test_training_and_whole_canvases_run_as_they_are() -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("compiled")

    model = model_of("dream")
    model.trunk = compiled_trunk(model.model, model.plain_trunk, backend=never)
    tokens, layout, rows = batch_of(model, [9, 4], 3)
    assert model.hidden(tokens, layout, rows).shape == (len(rows), model.config.hidden)
    with torch.no_grad():
        assert model.hidden(tokens, layout).shape == (13, model.config.hidden)
        assert model.hidden(tokens, layout, rows[:1]).shape == (1, model.config.hidden)


def test_a_compiler_that_is_missing_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    with pytest.raises(ConfigurationError, match=r"compile: the model cannot be run so here: .*ompiler"):
        accelerate(model_of("dream"), 64, compiled=True)


@pytest.mark.parametrize(("dtype", "backend"), [(torch.float32, "cpp"), (torch.float64, "sdpa")])
def test_automatic_attention_on_a_cpu(dtype: torch.dtype, backend: str) -> None:
    model = model_of("llada", dtype)
    accelerate(model, model.context_length)
    assert model.model.attention_backend == backend
    assert model.trunk == model.plain_trunk

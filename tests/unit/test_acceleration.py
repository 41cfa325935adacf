"""What may stand in for a model's trunk gives the same states: padded to buckets, compiled, with another attention."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters

from kernels.recording import bucket
from server.errors import ConfigurationError
from server.models.acceleration import Acceleration, accelerate
from server.models.compiled import CompiledTrunk
from server.models.loading import load_diffusion_model
from server.models.packing import PackedLayout, runs_of
from server.models.padding import Shape, pad, shape_of

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILIES = ("dream-tiny", "llada-tiny")
LENGTHS = ([9], [20, 20, 20], [3, 17, 40, 8], [1, 1], [33] * 7, [5, 64, 5, 64, 12])


def model_of(family: str, dtype: torch.dtype = torch.float64) -> Any:
    return load_diffusion_model(GOLDEN / family / "dlm", dtype=dtype).model


def batch_of(model: Any, lengths: list[int], seed: int) -> tuple[torch.Tensor, PackedLayout, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, model.vocab_size, (sum(lengths),), generator=generator)
    rows = torch.randperm(len(tokens), generator=generator)[: max(1, len(tokens) // 2)].sort().values
    return tokens, PackedLayout.of(lengths), rows


def test_buckets() -> None:
    assert [bucket(n) for n in (1, 16, 17, 24, 25, 32, 33, 48, 49, 64, 65, 96, 97, 3000)] == [
        16, 16, 24, 24, 32, 32, 48, 48, 64, 64, 96, 96, 128, 3072,
    ]  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=12), rows=st.integers(1, 400))
def test_a_padded_batch_has_exactly_its_buckets_shape(lengths: list[int], rows: int) -> None:
    layout = PackedLayout.of(lengths)
    shape = shape_of(layout, rows)
    tokens, padded, places = pad(torch.ones(sum(lengths), dtype=torch.int64), layout, torch.zeros(rows).long(), shape)
    assert len(tokens) == len(padded.positions) == shape.tokens
    assert len(padded.cu_seqlens) == shape.sequences + 1
    assert len(places) == shape.rows
    assert padded.max_length == shape.longest
    sizes = padded.cu_seqlens.diff().tolist()
    assert sizes[: len(lengths)] == lengths
    assert sum(sizes) == shape.tokens
    assert max(sizes) <= shape.longest
    assert runs_of(sizes) == padded.runs
    assert all(size < 2 * max(real, 16) for size, real in zip(dataclasses.astuple(shape), (
        sum(lengths), len(lengths) + -(-(shape.tokens - sum(lengths)) // shape.longest), max(lengths), rows
    ), strict=True))  # fmt: skip


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_no_real_row(family: str, lengths: list[int], backend: str) -> None:
    """`reference` reads nothing but what a recorded graph's kernel would: tokens, positions and cu_seqlens."""
    model = model_of(family)
    tokens, layout, rows = batch_of(model, lengths, 1)
    with torch.no_grad():
        expected = model.backbone.forward(tokens, layout, rows)
        model.backbone.attention_backend = backend
        padded = model.backbone.forward(*pad(tokens, layout, rows, shape_of(layout, len(rows))))
    torch.testing.assert_close(padded[: len(rows)], expected, rtol=0, atol=1e-12)


def test_one_shape_serves_many_batches() -> None:
    """Ragged batches of a running server fall into few buckets."""
    generator = torch.Generator().manual_seed(2)
    shapes: set[Shape] = set()
    for _ in range(300):
        lengths = torch.randint(60, 120, (12,), generator=generator).tolist()
        shapes.add(shape_of(PackedLayout.of(lengths), int(torch.randint(1, 700, (1,), generator=generator))))
    assert len(shapes) <= 40


@pytest.mark.parametrize("family", FAMILIES)
def test_one_compiled_graph_serves_ragged_batches(family: str) -> None:
    """aot_eager is torch.compile's whole front end on ordinary kernels: what it traced, and how often."""
    model = model_of(family)
    torch._dynamo.reset()
    counters.clear()
    model.trunk = CompiledTrunk(model.backbone, backend="aot_eager")
    with torch.no_grad():
        for seed, lengths in enumerate(([11, 6, 6], *LENGTHS)):
            tokens, layout, rows = batch_of(model, lengths, seed)
            got = model.hidden(tokens, layout, rows)
            torch.testing.assert_close(got, model.backbone.forward(tokens, layout, rows), rtol=0, atol=1e-12)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.slow
def test_compiled_logits_equal_plain_ones() -> None:
    model = model_of("dream-tiny", torch.float32)
    torch._dynamo.reset()
    counters.clear()
    accelerate(model, Acceleration(compile=True), model.context_length)
    plain = model_of("dream-tiny", torch.float32)
    with torch.no_grad():
        for seed, lengths in enumerate(LENGTHS):
            batch = batch_of(model, lengths, seed)
            expected = plain.masked_logits(*batch)
            torch.testing.assert_close(model.masked_logits(*batch), expected, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1


def test_training_and_whole_canvases_run_as_they_are() -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("compiled")

    model = model_of("dream-tiny")
    model.trunk = CompiledTrunk(model.backbone, backend=never)
    tokens, layout, rows = batch_of(model, [9, 4], 3)
    assert model.hidden(tokens, layout, rows).shape == (len(rows), model.config.hidden_size)
    with torch.no_grad():
        assert model.hidden(tokens, layout).shape == (13, model.config.hidden_size)
        assert model.hidden(tokens, layout, rows[:1]).shape == (1, model.config.hidden_size)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Acceleration(attention_backend="varlen"), "attention_backend: varlen cannot run here: it needs a CUDA device"),
        (
            Acceleration(attention_backend="fast"),
            "attention_backend: 'fast' is not one of auto, varlen, cpp, sdpa",
        ),
        (Acceleration(cuda_graphs=True), "cuda_graphs: there are none on cpu"),
    ],
)
def test_what_cannot_work_here_is_refused(options: Acceleration, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        accelerate(model_of("dream-tiny"), options, 64)


def test_a_compiler_that_is_missing_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    with pytest.raises(ConfigurationError, match=r"compile: the model cannot be run so here: .*ompiler"):
        accelerate(model_of("dream-tiny"), Acceleration(compile=True), 64)


@pytest.mark.parametrize(("dtype", "backend"), [(torch.float32, "cpp"), (torch.float64, "sdpa")])
def test_automatic_attention_on_a_cpu(dtype: torch.dtype, backend: str) -> None:
    model = model_of("llada-tiny", dtype)
    accelerate(model, Acceleration(), model.context_length)
    assert model.backbone.attention_backend == backend
    assert model.trunk == model.backbone.forward

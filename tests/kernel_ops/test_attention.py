"""Attention of packed rows in C++ against a softmax written out in float64, values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels import attention, varlen
from kernels.attention import Piece, Rows

pytestmark = pytest.mark.skipif(not attention.available(), reason="no C++ compiler")

# Lengths of queries, own keys, and the pieces before them: whole sequences, rows behind prefixes (shared, chained,
# none), single last queries, one longer than a block of queries, one without a query.
SHAPES = (
    ([3], [3], [[]]),
    ([7, 1, 64, 5], [7, 1, 64, 5], [[], [], [], []]),
    ([5, 5, 9, 130], [5, 5, 9, 130], [[1], [1], [2, 0], []]),
    ([1, 1, 1], [6, 40, 1], [[0], [], [2, 0]]),
    ([4, 0, 3], [4, 2, 3], [[0], [0], []]),
)
PIECES = (3, 17, 70)
HEADS = ((4, 2, 32), (3, 3, 8), (4, 1, 64), (2, 2, 20), (8, 2, 128), (1, 1, 1))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def written_out(q: Tensor, k: Tensor, v: Tensor, shape: int, pieces: list[Piece], causal: bool) -> Tensor:
    """Row by row in the inputs' dtype, with plain tensor operations."""
    outputs = []
    first_q = first_k = 0
    groups = q.shape[1] // k.shape[1]
    for queries, own, before in zip(*SHAPES[shape], strict=True):
        keys, values = (
            torch.cat([*(pieces[index][which].transpose(0, 1) for index in before), x[first_k : first_k + own]])
            for which, x in ((0, k), (1, v))
        )
        keys, values = (x.repeat_interleave(groups, dim=1).transpose(0, 1) for x in (keys, values))
        scores = q[first_q : first_q + queries].transpose(0, 1) @ keys.transpose(1, 2) / math.sqrt(q.shape[-1])
        if causal:
            hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(scores.shape[2] - queries + 1)
            scores = scores.masked_fill(hidden, -math.inf)
        outputs.append((scores.softmax(-1) @ values).transpose(0, 1))
        first_q, first_k = first_q + queries, first_k + own
    return torch.cat(outputs)


def inputs(shape: int, heads: tuple[int, int, int]) -> tuple[list[Tensor], list[Piece], Rows]:
    queries, keys, before = SHAPES[shape]
    many, few, size = heads
    q, k, v = (torch.randn(sum(n), count, size) for n, count in ((queries, many), (keys, few), (keys, few)))
    pieces = [(torch.randn(few, n, size), torch.randn(few, n, size)) for n in PIECES]
    return [q, k, v], pieces, Rows(queries, keys, before, PIECES)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_it_is_the_written_out_softmax(shape: int, heads: tuple[int, int, int], causal: bool) -> None:
    tensors, pieces, rows = inputs(shape, heads)
    results = []
    g = torch.randn_like(tensors[0])
    for dtype in (torch.float32, torch.float64):
        leaves = [x.to(dtype).requires_grad_() for x in tensors]
        if dtype == torch.float32:
            out = attention.attend(*leaves, rows, pieces, causal=causal)
        else:
            out = written_out(*leaves, shape, [(k.double(), v.double()) for k, v in pieces], causal)
        results.append([out, *torch.autograd.grad(out, leaves, g.to(dtype))])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


def test_sharp_and_flat_scores() -> None:
    """Scores of +-1000 neither overflow nor turn into NaN, and equal ones give the mean."""
    v = torch.randn(4, 1, 8)
    k = torch.zeros(4, 1, 8)
    k[2] = 1000.0
    q = torch.stack([torch.ones(1, 8), torch.zeros(1, 8), -torch.ones(1, 8), torch.ones(1, 8)])
    out = attention.attend(q, k, v, Rows([4], [4]))
    torch.testing.assert_close(out[0], v[2])
    torch.testing.assert_close(out[1], v.mean(0))
    torch.testing.assert_close(out[2], v[[0, 1, 3]].mean(0))


def test_a_broken_row_stays_alone() -> None:
    """NaN in one row reaches no other: one request's failure is never another's."""
    tensors, pieces, rows = inputs(1, (4, 2, 32))
    expected = attention.attend(*tensors, rows, pieces)
    for x in tensors[1:]:
        x[7] = math.nan  # the second row's only key
    got = attention.attend(*tensors, rows, pieces)
    assert got[7].isnan().all()
    others = torch.arange(len(got)) != 7
    assert torch.equal(got[others], expected[others])


def test_the_number_of_threads_changes_nothing() -> None:
    tensors, pieces, rows = inputs(2, (4, 2, 32))
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            results.append(attention.attend(*tensors, rows, pieces, causal=True))
        finally:
            torch.set_num_threads(threads)
    assert all(torch.equal(each, results[0]) for each in results[1:])


def test_strided_inputs_are_read_as_they_lie() -> None:
    tensors, pieces, rows = inputs(1, (4, 2, 32))
    apart = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in tensors]
    assert torch.equal(attention.attend(*apart, rows, pieces), attention.attend(*tensors, rows, pieces))


def test_what_does_not_fit_is_refused() -> None:
    (q, k, v), pieces, rows = inputs(2, (4, 2, 32))
    for bad in ((q[1:], k, v), (q, k[1:], v[1:]), (q, k, v[..., :8]), (q[:, :3], k, v)):
        with pytest.raises(ValueError, match="queries"):
            attention.attend(*bad, rows, pieces)
    with pytest.raises(ValueError, match="float32 on the CPU"):
        attention.attend(q.double(), k, v, rows, pieces)
    with pytest.raises(ValueError, match="piece"):
        attention.attend(q, k, v, rows, pieces[:1] + [(keys[:, 1:], values[:, 1:]) for keys, values in pieces[1:]])
    with pytest.raises(ValueError, match="a piece of keys"):
        attention.attend(q, k, v, rows, [(keys.transpose(0, 1), values.transpose(0, 1)) for keys, values in pieces])
    for queries, keys, before in (([2], [1], None), ([], [], None), ([1], [1, 1], None), ([3], [1], [[0]])):
        with pytest.raises(ValueError, match="queries"):
            Rows(queries, keys, before, (1,))


def test_it_is_what_a_cpu_takes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert varlen.choose("auto", cpu, torch.float32, 32) == "cpp"
    assert varlen.choose("auto", cpu, torch.float64, 32) == "sdpa"
    with pytest.raises(ValueError, match="cpp cannot run here: it needs float32 on the CPU, not bfloat16"):
        varlen.choose("cpp", cpu, torch.bfloat16, 32)
    monkeypatch.setenv("KERNELS_BACKEND", "torch")
    assert varlen.choose("auto", cpu, torch.float32, 32) == "sdpa"
    with pytest.raises(ValueError, match="KERNELS_BACKEND"):
        varlen.choose("cpp", cpu, torch.float32, 32)

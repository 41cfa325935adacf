"""Attention of packed rows in C++ against a softmax written out in float64, values and gradients."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from kernels import attention, varlen
from kernels.attention import Piece, Rows
from kernels.cpp import library
from tests.support.kernels import choose_kernels

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler")

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


def inputs(
    shape: int, heads: tuple[int, int, int], dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], list[Piece], Rows]:
    queries, keys, before = SHAPES[shape]
    many, few, size = heads
    q, k, v = (torch.randn(sum(n), count, size).to(dtype) for n, count in ((queries, many), (keys, few), (keys, few)))
    pieces = [(torch.randn(few, n, size).to(dtype), torch.randn(few, n, size).to(dtype)) for n in PIECES]
    return [q, k, v], pieces, Rows(queries, keys, before, PIECES)


@pytest.mark.parametrize("target", ["native", "baseline"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", HEADS)
def test_it_is_the_written_out_softmax(
    monkeypatch: pytest.MonkeyPatch, heads: tuple[int, int, int], dtype: torch.dtype, target: str
) -> None:
    """Values and gradients, against float64 on what the inputs hold."""
    choose_kernels(monkeypatch, CPP=target)
    for shape, causal in itertools.product(range(len(SHAPES)), (False, True)):
        tensors, pieces, rows = inputs(shape, heads, dtype)
        g = torch.randn_like(tensors[0])
        ours, exact = ([x.to(kind).requires_grad_() for x in tensors] for kind in (dtype, torch.float64))
        out = attention.attend(*ours, rows, pieces, causal=causal)
        truth = written_out(*exact, shape, [(k.double(), v.double()) for k, v in pieces], causal)
        assert out.dtype == dtype
        results = zip(
            [out, *torch.autograd.grad(out, ours, g)],
            [truth, *torch.autograd.grad(truth, exact, g.double())],
            strict=True,
        )
        for got, expected in results:
            if dtype == torch.float32:
                torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
            else:  # one rounding of what is stored, and in gradients that of the output which they are made with
                assert (got.double() - expected).norm() <= 2**-7 * expected.norm() + 1e-9


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
    for wrong in (q.double(), q.bfloat16()):
        with pytest.raises(ValueError, match="on the CPU is wanted"):
            attention.attend(wrong, k, v, rows, pieces)
    with pytest.raises(ValueError, match="piece"):
        attention.attend(q, k, v, rows, pieces[:1] + [(keys[:, 1:], values[:, 1:]) for keys, values in pieces[1:]])
    with pytest.raises(ValueError, match="not contiguous"):
        attention.attend(q, k, v, rows, [(keys, torch.stack([values, values], -1)[..., 0]) for keys, values in pieces])
    for queries, keys, before in (([2], [1], None), ([], [], None), ([1], [1, 1], None), ([3], [1], [[0]])):
        with pytest.raises(ValueError, match="queries"):
            Rows(queries, keys, before, (1,))


def test_what_a_cpu_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        assert varlen.choose("auto", cpu, dtype, 32) == "cpp"
    assert varlen.choose("auto", cpu, torch.float64, 32) == "sdpa"
    with pytest.raises(ValueError, match="cpp cannot run here: it needs float32 or bfloat16 on the CPU, not float16"):
        varlen.choose("cpp", cpu, torch.float16, 32)
    for name, value in (("BACKEND", "torch"), ("CPP", "off")):
        with monkeypatch.context() as patch:
            choose_kernels(patch, **{name: value})
            assert varlen.choose("auto", cpu, torch.float32, 32) == "sdpa"
            with pytest.raises(ValueError, match="the environment turns the C"):
                varlen.choose("cpp", cpu, torch.float32, 32)

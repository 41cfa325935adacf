"""Attention of packed rows in C++ against `varlen.reference` in float64, values and gradients."""

import itertools
import math

import pytest
import torch

from kernels import attention, varlen
from kernels.attention import Rows
from kernels.cpp.build import library
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


def specified(q, k, v, shape, pieces, causal):
    """By `varlen.reference` in the inputs' dtype, each row's keys and values put together."""
    queries, own, before = SHAPES[shape]
    keys, values = (
        torch.cat([
            part
            for row, last in zip(before, x.split(own), strict=True)
            for part in (*(pieces[index][which].transpose(0, 1) for index in row), last)
        ])
        for which, x in ((0, k), (1, v))
    )  # fmt: skip
    lengths = [count + sum(PIECES[index] for index in row) for count, row in zip(own, before, strict=True)]
    return varlen.attend("reference", q, keys, values, varlen.Spans.of(queries, lengths), causal=causal)


def inputs(shape, heads, dtype=torch.float32):
    torch.manual_seed(0)
    queries, keys, before = SHAPES[shape]
    many, few, size = heads
    sizes = ((queries, many), (keys, few), (keys, few))
    q, k, v = (torch.randn(count, sum(n), size).to(dtype).transpose(0, 1) for n, count in sizes)  # not contiguous
    pieces = [(torch.randn(few, n, size).to(dtype), torch.randn(few, n, size).to(dtype)) for n in PIECES]
    return [q, k, v], pieces, Rows(queries, keys, before, PIECES)


@pytest.mark.parametrize("target", ["native", "baseline"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", HEADS)
def test_it_is_the_specification(monkeypatch, heads, dtype, target):
    """Values and gradients, against float64 on what the inputs hold."""
    choose_kernels(monkeypatch, CPP=target)
    for shape, causal in itertools.product(range(len(SHAPES)), (False, True)):
        tensors, pieces, rows = inputs(shape, heads, dtype)
        g = torch.randn_like(tensors[0])
        ours, exact = ([x.to(kind).requires_grad_() for x in tensors] for kind in (dtype, torch.float64))
        out = attention.attend(*ours, rows, pieces, causal=causal)
        truth = specified(*exact, shape, [(k.double(), v.double()) for k, v in pieces], causal)
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


def test_sharp_and_flat_scores():
    """Scores of +-1000 neither overflow nor turn into NaN, and equal ones give the mean."""
    v = torch.randn(4, 1, 8)
    k = torch.zeros(4, 1, 8)
    k[2] = 1000.0
    q = torch.stack([torch.ones(1, 8), torch.zeros(1, 8), -torch.ones(1, 8), torch.ones(1, 8)])
    out = attention.attend(q, k, v, Rows([4], [4]))
    torch.testing.assert_close(out[0], v[2])
    torch.testing.assert_close(out[1], v.mean(0))
    torch.testing.assert_close(out[2], v[[0, 1, 3]].mean(0))


def test_a_broken_row_stays_alone():
    """NaN in one row reaches no other: one request's failure is never another's."""
    tensors, pieces, rows = inputs(1, (4, 2, 32))
    expected = attention.attend(*tensors, rows, pieces)
    for x in tensors[1:]:
        x[7] = math.nan  # the second row's only key
    got = attention.attend(*tensors, rows, pieces)
    assert got[7].isnan().all()
    others = torch.arange(len(got)) != 7
    assert torch.equal(got[others], expected[others])


def test_what_does_not_fit_is_refused():
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


def test_what_a_cpu_takes(monkeypatch):
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

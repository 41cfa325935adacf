"""The fused passes of a decoder block against plain float64 expressions, values and gradients: those in C++ and, run by
test_triton_interpreter.py, a GPU's."""

import pytest
import torch
from torch.nn import functional

from kernels import blocks
from kernels.blocks import Turn
from kernels.cpp.build import library
from tests.kernel_ops.conftest import INTERPRETED
from tests.support.kernels import choose_kernels

EPSILON = 1e-6
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}  # a handful of float32 roundings

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler")


def root_mean_square(x):
    return (x.pow(2).mean(-1, keepdim=True) + EPSILON).sqrt()


def rms(x, weight):
    return x / root_mean_square(x) * weight


def turn(x, cosines, sines):
    first, second = x.chunk(2, dim=-1)
    cosines, sines = cosines[:, None], sines[:, None]
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)


if INTERPRETED:
    from kernels.gpu import blocks

ROUNDING = 2**-7 if INTERPRETED else 2**-8  # to bfloat16; the interpreter cuts off what does not fit


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ON_GPU = pytest.param("gpu", marks=[pytest.mark.gpu, NO_GPU])
TARGETS = ["interpreter"] if INTERPRETED else ["native", "baseline", ON_GPU]


@pytest.fixture(params=TARGETS, autouse=True)
def target(request, monkeypatch):
    """In C++ compiled for this processor and for every one of its architecture; a GPU's on tensors of a GPU."""
    torch.manual_seed(0)
    if request.param in ("native", "baseline"):
        choose_kernels(monkeypatch, CPP=request.param)
    if request.param == "gpu":
        torch.set_default_device("cuda")
    yield request.param
    torch.set_default_device(None)


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def dtype(request):
    return request.param


def compare(fused, back, plain, x, unit=None, more=None):
    """Values, and gradients along a random direction, against float64 on what x holds. `back` turns the gradient of the
    values into that of x, to which the fused pass adds `more`.

    The gradient of a norm is a difference of two terms of the size of the direction over x's root mean square: a
    direction in such units makes both terms of order one, which is what the absolute tolerance is meant for.
    """
    exact = x.double().requires_grad_()
    out, expected = fused(x), plain(exact)
    along = (torch.randn(out.shape) * (1.0 if unit is None else unit)).to(x.dtype)
    (reference,) = torch.autograd.grad(expected, [exact], along.double())
    if more is not None:
        reference += more.double()
    for got, truth in ((out, expected), (back(along), reference)):
        assert got.dtype == x.dtype
        if x.dtype == torch.float32:
            torch.testing.assert_close(got.double(), truth, **TOLERANCE)
        else:  # rounded once
            torch.testing.assert_close(got.double(), truth, rtol=ROUNDING, atol=1e-5)


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 7), (5, 64), (17, 192)])
def test_rms_norm(rows, width, dtype):
    weight = torch.randn(width).to(dtype)
    x = (torch.randn(rows, width) * torch.logspace(-3, 3, rows)[:, None]).to(dtype)
    total, out, inverse = blocks.add_rms_norm(x, None, weight, EPSILON)
    assert total is x
    for more in (None, torch.randn(rows, width).to(dtype)):
        compare(
            lambda _: out,
            lambda g, more=more: blocks.rms_norm_gradient(g, x, weight, inverse, more),
            lambda x: rms(x, weight.double()),
            x,
            root_mean_square(x),
            more,
        )


def test_what_is_added_before_a_norm_is_rounded_as_a_sum_is(dtype):
    x, added, weight = torch.randn(9, 40).to(dtype), torch.randn(9, 40).to(dtype), torch.randn(40).to(dtype)
    total, out, inverse = blocks.add_rms_norm(x, added, weight, EPSILON)
    assert total.equal(x + added) or (INTERPRETED and dtype == torch.bfloat16)
    alone = blocks.add_rms_norm(total, None, weight, EPSILON)
    assert out.equal(alone[1])
    assert inverse.equal(alone[2])


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 7), (9, 576)])
def test_swiglu(rows, width, dtype, target):
    x = (torch.randn(rows, 2 * width) * 5).to(dtype)
    x[0, 0], x[-1, 0] = -120.0, 120.0  # exp must neither overflow nor turn into NaN
    plain = lambda x: functional.silu(x[:, :width]) * x[:, width:]  # noqa: E731
    compare(blocks.swiglu, lambda g: blocks.swiglu_gradient(g, x), plain, x)
    if target in ("interpreter", "gpu"):  # there gate and up are always stacked
        return
    gate, up = (part.clone(memory_format=torch.contiguous_format) for part in x.chunk(2, dim=1))
    assert blocks.swiglu_apart(gate, up).equal(blocks.swiglu(x))


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(4, 2, 8), (3, 3, 2), (6, 0, 32), (0, 2, 64)])
def test_split_heads(heads, key_heads, size, normed, dtype):
    rows = 5
    angles = torch.randn(rows, size // 2, dtype=torch.float64)
    of_q, of_k = (torch.randn(size).to(dtype) if normed else None for _ in range(2))
    how = Turn(of_q, of_k, EPSILON, angles.cos().float(), angles.sin().float())

    def plain(x):
        q, k, v = x.view(rows, -1, size).split([heads, key_heads, key_heads], dim=1)
        if of_q is not None and of_k is not None:
            q, k = rms(q, of_q.double()), rms(k, of_k.double())
        return torch.cat((turn(q, angles.cos(), angles.sin()), turn(k, angles.cos(), angles.sin()), v), dim=1)

    def back(g):
        parts = (part.contiguous() for part in g.split([heads, key_heads, key_heads], dim=1))
        return blocks.split_heads_gradient(*parts, x, how)

    x = torch.randn(rows, (heads + 2 * key_heads) * size).to(dtype)
    unit = root_mean_square(x.view(rows, -1, size)) if normed else None
    compare(lambda x: torch.cat(blocks.split_heads(x, heads, key_heads, how), dim=1), back, plain, x, unit)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is not asked")
def test_what_it_does_not_take(monkeypatch, target):
    assert blocks.runs(torch.ones(2, 2))
    assert not blocks.runs(torch.ones(2, 2, dtype=torch.float64))
    assert blocks.runs(torch.ones(2, 2, dtype=torch.bfloat16))
    assert blocks.runs(torch.ones(2, 2, dtype=torch.float16)) == (target == "gpu")
    assert not blocks.runs(torch.ones(0, 2))
    choose_kernels(monkeypatch, BACKEND="torch")
    assert not blocks.runs(torch.ones(2, 2))
    one, angles = (torch.ones(1, width, device="cpu") for width in (2048, 1024))
    with pytest.raises(ValueError, match="heads of 2048 channels"):
        blocks.split_heads(one, 1, 0, Turn(None, None, EPSILON, angles, angles))

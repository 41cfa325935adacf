"""Products with 16-bit weights on a CPU without instructions for them: against float64, blocks and gradient."""

import pytest
import torch

from kernels import linear as module
from kernels.linear import NARROW, activation_dtype, linear
from tests.support.kernels import choose_kernels

SHAPES = ((1, 3, 5), (7, 64, 1), (33, 256, 5000), (512, 129, 1025))


def _case(rows, inner, outer, dtype):
    generator = torch.Generator().manual_seed(rows + inner + outer)
    x = torch.randn(rows, inner, generator=generator)
    weight, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((outer, inner), (outer,)))
    return x, weight, bias


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [1, 1 << 10, module.BLOCK_ELEMENTS])
def test_product_is_that_of_the_stored_weights(monkeypatch, dtype, shape, block):
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", block)
    x, weight, bias = _case(*shape, dtype)
    exact = x.double() @ weight.double().T + bias.double()
    got = linear(x.requires_grad_(), weight, bias)
    assert got.dtype == torch.float32
    # Rounding of a float32 sum of `inner` products, each of about 1.
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=4e-7 * shape[1])
    assert torch.equal(linear(x, weight) + bias, got)
    g = torch.randn(shape[0], shape[2], generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(got, [x], g)
    torch.testing.assert_close(gradient.double(), g.double() @ weight.double(), rtol=1e-6, atol=4e-7 * shape[2])


def test_equal_dtypes_are_torchs_own_product():
    x, weight, bias = _case(33, 256, 500, torch.float32)
    assert torch.equal(linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
    assert linear(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("device", "native", "weights", "expected"),
    [
        ("cuda", "0", torch.bfloat16, torch.bfloat16),
        ("cuda", "0", torch.float16, torch.float16),
        ("cpu", "1", torch.float32, torch.float32),
        ("cpu", "1", torch.float64, torch.float64),
        ("cpu", "1", torch.float16, torch.float32),
        ("cpu", "1", torch.bfloat16, torch.bfloat16),
        ("cpu", "0", torch.bfloat16, torch.float32),
    ],
)
def test_activations_are_wider_only_on_a_cpu_without_instructions(monkeypatch, device, native, weights, expected):
    choose_kernels(monkeypatch, BFLOAT16=native)
    assert activation_dtype(weights, torch.device(device)) == expected

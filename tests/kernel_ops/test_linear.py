"""Products with 16-bit weights on a CPU without instructions for them: against float64, blocks and gradient."""

from __future__ import annotations

import pytest
import torch

from kernels import linear as module
from kernels.linear import NARROW, activation_dtype, linear
from tests.support.kernels import choose_kernels

SHAPES = ((1, 3, 5), (7, 64, 1), (33, 256, 5000), (512, 129, 1025))


def _case(rows: int, inner: int, outer: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + inner + outer)
    x = torch.randn(rows, inner, generator=generator)
    weight, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((outer, inner), (outer,)))
    return x, weight, bias


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [1, 1 << 10, module.BLOCK_ELEMENTS])
def test_product_is_that_of_the_stored_weights(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, shape: tuple[int, int, int], block: int
) -> None:
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", block)
    x, weight, bias = _case(*shape, dtype)
    exact = x.double() @ weight.double().T + bias.double()
    got = linear(x, weight, bias)
    assert got.dtype == torch.float32
    # Rounding of a float32 sum of `inner` products, each of about 1.
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=4e-7 * shape[1])
    assert torch.equal(linear(x, weight) + bias, got)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_with_respect_to_the_input(shape: tuple[int, int, int]) -> None:
    x, weight, bias = _case(*shape, torch.bfloat16)
    g = torch.randn(shape[0], shape[2], generator=torch.Generator().manual_seed(1))
    x.requires_grad_(True)
    (got,) = torch.autograd.grad(linear(x, weight, bias), [x], g)
    torch.testing.assert_close(got.double(), g.double() @ weight.double(), rtol=1e-6, atol=4e-7 * shape[2])


def test_equal_dtypes_are_torchs_own_product() -> None:
    x, weight, bias = _case(33, 256, 500, torch.float32)
    assert torch.equal(linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
    assert linear(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("device", "weights", "expected"),
    [
        ("cuda", torch.bfloat16, torch.bfloat16),
        ("cuda", torch.float16, torch.float16),
        ("cpu", torch.float32, torch.float32),
        ("cpu", torch.float64, torch.float64),
        ("cpu", torch.float16, torch.float32),
    ],
)
def test_activations_are_wider_only_on_a_cpu(device: str, weights: torch.dtype, expected: torch.dtype) -> None:
    assert activation_dtype(weights, torch.device(device)) == expected


@pytest.mark.parametrize("native", [False, True])
def test_a_processor_with_instructions_for_bfloat16_uses_them(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    choose_kernels(monkeypatch, BFLOAT16=str(int(native)))
    expected = torch.bfloat16 if native else torch.float32
    assert activation_dtype(torch.bfloat16, torch.device("cpu")) == expected

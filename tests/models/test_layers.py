"""Norm and rotary embedding against their definitions in float64."""

import cmath

import pytest
import torch

from server.models.layers import RMSNorm, RotaryTable, rotate


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_computes_half_precision_in_float32(dtype):
    """Within one rounding of the exact result: squares of large float16 numbers overflow if computed in float16."""
    x = (torch.randn(7, 64, generator=torch.Generator().manual_seed(1)) * 1000).to(dtype)
    norm = RMSNorm(64, 1e-6).to(dtype)
    exact = RMSNorm(64, 1e-6).double()(x.double())
    out = norm(x)
    assert out.dtype == dtype
    assert ((out.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps).all()


def test_rotation_is_a_complex_product():
    theta, head_dim, positions = 500.0, 8, [0, 1, 5, 1000]
    x = torch.randn(4, 2, head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    cos, sin = RotaryTable(head_dim, theta).rows(torch.tensor(positions), 1001, torch.float64)
    out = rotate(x, cos, sin)
    for row, position in enumerate(positions):
        for head in range(2):
            for i in range(head_dim // 2):
                value = complex(x[row, head, i], x[row, head, i + 4])
                turned = value * cmath.exp(1j * position * theta ** (-2 * i / head_dim))
                assert out[row, head, i].item() == pytest.approx(turned.real, abs=1e-12)
                assert out[row, head, i + 4].item() == pytest.approx(turned.imag, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_tables_are_float32_and_exact_at_far_positions(dtype):
    """The angle 100,000 radians is off by 4e-3 when it is formed in float32; the table is within one rounding."""
    table = RotaryTable(64, 1e6)
    positions = torch.tensor([0, 3, 99_999])
    cos, sin = table.rows(positions, 100_000, dtype)
    angles = positions.double().unsqueeze(1) * 1e6 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    assert cos.dtype == sin.dtype == torch.float32
    torch.testing.assert_close(cos.double(), angles.cos(), rtol=0, atol=6e-8)
    torch.testing.assert_close(sin.double(), angles.sin(), rtol=0, atol=6e-8)


def test_rotary_table_grows():
    table = RotaryTable(4, 10.0)
    short, _ = table.rows(torch.tensor([2]), 3, torch.float64)
    long, _ = table.rows(torch.tensor([2, 700]), 701, torch.float64)
    assert torch.equal(short[0], long[0])
    assert long[1, 0].item() == pytest.approx(torch.tensor(700.0, dtype=torch.float64).cos().item(), abs=1e-12)


def test_a_table_first_used_in_inference_mode_serves_training():
    table = RotaryTable(4, 10.0)
    with torch.inference_mode():
        table.rows(torch.tensor([0]), 1, torch.float32)
    x = torch.ones(1, 1, 4, requires_grad=True)
    rotate(x, *table.rows(torch.tensor([0]), 1, torch.float32)).sum().backward()
    assert x.grad is not None

"""x @ weight.T (+ bias) where the weight is kept in 16 bits and the processor has no instructions for it.

On such a CPU torch's own 16-bit product converts as it goes and runs at a tenth of the float32 rate. Here activations
stay in float32, and rows of the weight are widened block by block into a float32 buffer that stays in the cache, then
multiplied from there. That is more exact too (only the weights are rounded) and, for few rows of x, faster than
float32 weights, since half as much is read from memory.

Which of the two is meant is read off the dtypes: equal ones are torch's product, float32 activations with a narrower
weight are this one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kernels.settings import settings

BLOCK_ELEMENTS = 1 << 18
"""Of the widened block, 1 MB: the best of 128 kB to 8 MB on a processor with 512 kB of L2 and 32 MB of L3."""

NARROW = (torch.bfloat16, torch.float16)


def activation_dtype(weight_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """In which dtype a network with such weights computes on a device: the weights' own wherever there are
    instructions for it, float32 for 16-bit weights elsewhere (a CPU without avx512_bf16 or amx_bf16, float16)."""
    if device.type != "cpu" or weight_dtype not in NARROW:
        return weight_dtype
    return weight_dtype if weight_dtype == torch.bfloat16 and settings().bfloat16 else torch.float32


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (N, in), weight (out, in), bias (out,) -> (N, out) in x's dtype; differentiable, where the dtypes differ with
    respect to x alone."""
    if x.dtype == weight.dtype:
        return functional.linear(x, weight, bias)
    if torch.compiler.is_compiling():
        return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        out: Tensor = _WideLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return out
    return _wide(x, weight, bias)


def linear_gradient(g: Tensor, weight: Tensor) -> Tensor:
    """The gradient (N, in) of x from that of `linear`, g (N, out)."""
    if g.dtype == weight.dtype:
        return torch.mm(g, weight)
    out = g.new_zeros(len(g), weight.shape[1])
    for block, wide in _widened(weight, g):
        out.addmm_(g[:, block], wide)
    return out


def _wide(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product by blocks of the weight's rows."""
    out = x.new_empty(len(x), len(weight))
    for block, wide in _widened(weight, x):
        torch.mm(x, wide.t(), out=out[:, block])
    return out if bias is None else out.add_(bias)


class _WideLinear(torch.autograd.Function):
    """`_wide`, and its gradient with respect to x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _wide(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return linear_gradient(*gradients, *ctx.saved_tensors), None, None


def _widened(weight: Tensor, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Ranges of the weight's rows, each with these rows in x's dtype, in the same memory every time."""
    height = min(max(1, BLOCK_ELEMENTS // max(1, weight.shape[1])), len(weight))
    buffer = x.new_empty(height, weight.shape[1])
    for start in range(0, len(weight), height):
        block = weight[start : start + height]
        yield slice(start, start + len(block)), buffer[: len(block)].copy_(block)

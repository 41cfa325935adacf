"""What a decoder block does between its matrix products, on a CPU: RMS norm, SwiGLU, heads.

Each is one pass over memory in C++, and its gradient with respect to the input another; weights are frozen here, so
there is no other gradient. Tensors are float32 or bfloat16, all of a call in one dtype; arithmetic is float32, and
what is stored is rounded once. Where `runs(x)` says no (another device or dtype, no compiler), callers keep the plain
expression of their model, with the rounding of the published one.

Shapes: S tokens, width d, H heads of `size` channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.cpp.build import DTYPES, call
from kernels.cpp.build import runs as cpp_runs

MAX_HEAD_SIZE = 1024  # of the C++ gradient's buffer


def runs(x: Tensor) -> bool:
    """Whether the passes below take x. KERNELS_BACKEND=reference or torch turns them off with the other kernels."""
    fits = x.device.type == "cpu" and x.dtype in DTYPES and x.numel() > 0
    return fits and not torch.compiler.is_compiling() and cpp_runs()


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight, over the last axis of x (..., d)."""
    inverse = torch.empty(x.shape[:-1])  # float32; the gradient reads it
    sizes = inverse.numel(), x.shape[-1]

    def norm(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        _call("rms_norm", x, weight, out, inverse, *sizes, float(epsilon))
        return out

    def gradient(x: Tensor, g: Tensor) -> Tensor:
        out = torch.empty_like(x)
        _call("rms_norm_gradient", g, x, weight, inverse, out, *sizes)
        return out

    out: Tensor = _fused(x, norm, gradient)
    return out


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up of x (S, 2 m), which holds [gate, up] -> (S, m)."""

    def forward(x: Tensor) -> Tensor:
        out = x.new_empty(x.shape[0], x.shape[1] // 2)
        _call("swiglu", x, x[:, out.shape[1] :], x.shape[1], out, *out.shape)
        return out

    def gradient(x: Tensor, g: Tensor) -> Tensor:
        out = torch.empty_like(x)
        _call("swiglu_gradient", g, x, out, *g.shape)
        return out

    out: Tensor = _fused(x, forward, gradient)
    return out


def swiglu_apart(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of two tensors (S, m), no gradient; the result takes the place of `gate`."""
    gate, up = gate.contiguous(), up.contiguous()
    _call("swiglu", gate, up, gate.shape[1], gate, *gate.shape)
    return gate


def split_heads(
    x: Tensor,
    heads: int,
    key_heads: int,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    epsilon: float,
    cosines: Tensor,
    sines: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """q (S, H, size), k and v (S, Hkv, size) of stacked projections x (S, (H + 2 Hkv) size); H or Hkv may be 0.

    Each head of q and k is normalised where it has a weight (size,), then rotated by cosines and sines (S, size / 2),
    channel i with channel i + size / 2. ValueError for heads wider than `MAX_HEAD_SIZE`.
    """
    rows, size, angles = len(x), 2 * cosines.shape[1], (cosines.float().contiguous(), sines.float().contiguous())
    if size > MAX_HEAD_SIZE:
        raise ValueError(f"heads of {size} channels; at most {MAX_HEAD_SIZE}")
    rotated = (query_weight, 0), (key_weight, heads * size)  # weight and first column of q and k
    unrotated = slice((heads + key_heads) * size, None)

    def split(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k = x.new_empty(rows, heads, size), x.new_empty(rows, key_heads, size)
        for part, (weight, first) in zip((q, k), rotated, strict=True):
            if part.numel():
                _call("rotate_heads", x[:, first:], x.shape[1], weight, float(epsilon), *angles, part, *part.shape)
        return q, k, x[:, unrotated].reshape(rows, -1, size).clone(memory_format=torch.contiguous_format)

    def gradient(x: Tensor, *gradients: Tensor) -> Tensor:
        out = torch.empty_like(x)
        for g, (weight, first) in zip(gradients, rotated, strict=False):
            if g.numel():
                here = g, x[:, first:], x.shape[1], weight, float(epsilon), *angles, out[:, first:]
                _call("rotate_heads_gradient", *here, *g.shape)
        out[:, unrotated] = gradients[2].reshape(rows, -1)
        return out

    q, k, v = _fused(x, split, gradient)
    return q, k, v


def _call(name: str, x: Tensor, *arguments: Tensor | int | float | None) -> None:
    """Calls a C++ pass on x and the others, which are in its dtype."""
    call(name, x, *arguments, x.dtype, torch.get_num_threads())


def _fused(x: Tensor, forward: Callable[[Tensor], Any], gradient: Callable[..., Tensor]) -> Any:
    """`forward` of x, by way of autograd only where `gradient` may be asked for: that costs as much as a small pass."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Fused.apply(x, forward, gradient)  # type: ignore[no-untyped-call]
    return forward(x.contiguous())


class _Fused(torch.autograd.Function):
    """`forward` of x, whose gradient with respect to x is `gradient` of x and the gradients of what it returned. Both
    get contiguous tensors."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, forward: Callable[[Tensor], Tensor | tuple[Tensor, ...]], gradient: Callable[..., Tensor]
    ) -> Tensor | tuple[Tensor, ...]:
        x = x.contiguous()
        ctx.save_for_backward(x)
        ctx.gradient = gradient
        return forward(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.gradient(*ctx.saved_tensors, *(g.contiguous() for g in gradients)), None, None

"""What a decoder block does between its matrix products, on a CPU: RMS norm, SwiGLU, heads.

Each is one pass over memory in C++, and its gradient with respect to the input another; weights are frozen here, so
there is no other gradient. Tensors are float32 or bfloat16, all of a call in one dtype; arithmetic is float32, and
what is stored is rounded once. Where `runs(x)` says no (another device or dtype, no compiler), callers keep the plain
expression of their model, with the rounding of the published one.

Shapes: S tokens, width d, H heads of `size` channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.cpp.build import PASS_DTYPES, call
from kernels.cpp.build import runs as cpp_runs

MAX_HEAD_SIZE = 1024  # of the C++ gradient's buffer


def runs(x: Tensor) -> bool:
    """Whether the passes below take x. KERNELS_BACKEND=reference or torch turns them off with the other kernels."""
    fits = x.device.type == "cpu" and x.dtype in PASS_DTYPES and x.numel() > 0
    return fits and not torch.compiler.is_compiling() and cpp_runs()


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight, over the last axis of x (..., d)."""
    out: Tensor = _RMSNorm.apply(x, weight, epsilon)  # type: ignore[no-untyped-call]
    return out


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up of x (S, 2 m), which holds [gate, up] -> (S, m)."""
    out: Tensor = _SwiGLU.apply(x)  # type: ignore[no-untyped-call]
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
    if 2 * cosines.shape[1] > MAX_HEAD_SIZE:
        raise ValueError(f"heads of {2 * cosines.shape[1]} channels; at most {MAX_HEAD_SIZE}")
    q, k, v = _Heads.apply(  # type: ignore[no-untyped-call]
        x, heads, key_heads, query_weight, key_weight, epsilon, cosines, sines
    )
    return q, k, v


def _call(name: str, x: Tensor, *arguments: Tensor | int | float | None) -> None:
    """Calls a C++ pass on x and the others, which are in its dtype."""
    call(name, x, *arguments, x.dtype, torch.get_num_threads())


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        x = x.contiguous()
        out, inverse = torch.empty_like(x), torch.empty(x.shape[:-1])  # float32
        _call("rms_norm", x, weight, out, inverse, inverse.numel(), x.shape[-1], float(epsilon))
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        out = torch.empty_like(x)
        g = gradients[0].contiguous()
        _call("rms_norm_gradient", g, x, weight, inverse, out, inverse.numel(), x.shape[-1])
        return out, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = x.new_empty(x.shape[0], x.shape[1] // 2)
        _call("swiglu", x, x[:, out.shape[1] :], x.shape[1], out, *out.shape)
        ctx.save_for_backward(x)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        out = torch.empty_like(x)
        g = gradients[0].contiguous()
        _call("swiglu_gradient", g, x, out, *g.shape)
        return out


class _Heads(torch.autograd.Function):
    """q, k and v of stacked projections; their gradients go back into one stacked gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        heads: int,
        key_heads: int,
        query_weight: Tensor | None,
        key_weight: Tensor | None,
        epsilon: float,
        cosines: Tensor,
        sines: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, cosines, sines = x.contiguous(), cosines.float().contiguous(), sines.float().contiguous()
        ctx.shape = rows, heads, key_heads, size = len(x), heads, key_heads, 2 * cosines.shape[1]
        ctx.epsilon = float(epsilon)
        q, k = x.new_empty(rows, heads, size), x.new_empty(rows, key_heads, size)
        for weight, part, first in ((query_weight, q, 0), (key_weight, k, heads)):
            if part.numel():
                here = x[:, first * size :]
                _call("rotate_heads", here, x.shape[1], weight, ctx.epsilon, cosines, sines, part, *part.shape)
        ctx.save_for_backward(x, query_weight, key_weight, cosines, sines)
        v = x[:, (heads + key_heads) * size :].reshape(rows, -1, size).clone(memory_format=torch.contiguous_format)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, query_weight, key_weight, cosines, sines = ctx.saved_tensors
        rows, heads, key_heads, size = ctx.shape
        out = torch.empty_like(x)
        for weight, g, first in ((query_weight, gradients[0], 0), (key_weight, gradients[1], heads)):
            if g.numel():
                here, there = x[:, first * size :], out[:, first * size :]
                _call(
                    "rotate_heads_gradient", g.contiguous(), here, x.shape[1], weight, ctx.epsilon, cosines, sines,
                    there, *g.shape,
                )  # fmt: skip
        out[:, (heads + key_heads) * size :] = gradients[2].reshape(rows, -1)
        return out, None, None, None, None, None, None, None

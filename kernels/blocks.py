"""What a decoder block does between its matrix products, for float32 on a CPU: RMS norm, SwiGLU, heads.

Each is one pass over memory in C++, and its gradient with respect to the input another; weights are frozen here, so
there is no other gradient. Where `runs(x)` says no (another device or dtype, no compiler), callers keep the plain
expression of their model, with the rounding of the published one.

Shapes: S tokens, width d, H heads of `size` channels.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from kernels.cpp import library
from kernels.cpp.build import threads
from kernels.dispatch import settings

MAX_HEAD_SIZE = 1024  # of the C++ gradient's buffer


def runs(x: Tensor) -> bool:
    """Whether the passes below take x. KERNELS_BACKEND=reference or torch turns them off with the other kernels."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    return settings().backend not in ("reference", "torch") and library() is not None and x.numel() > 0


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


def _call(name: str, *arguments: Tensor | int | float | None) -> None:
    """Call a C++ pass: tensors by address, integers as int64, floats as float, the number of threads last."""
    converted: list[Any] = []
    for value in arguments:
        if isinstance(value, Tensor):
            converted.append(ctypes.c_void_p(value.data_ptr()))
        elif isinstance(value, float):
            converted.append(ctypes.c_float(value))
        else:
            converted.append(ctypes.c_void_p(None) if value is None else ctypes.c_int64(value))
    getattr(library(), name)(*converted, ctypes.c_int32(threads()))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        x = x.contiguous()
        out, inverse = torch.empty_like(x), torch.empty(x.shape[:-1])
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
        out = torch.empty(x.shape[0], x.shape[1] // 2)
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
        x, cosines, sines = x.contiguous(), cosines.contiguous(), sines.contiguous()
        ctx.shape = rows, heads, key_heads, size = len(x), heads, key_heads, 2 * cosines.shape[1]
        ctx.epsilon = float(epsilon)
        q, k = torch.empty(rows, heads, size), torch.empty(rows, key_heads, size)
        for weight, part, first in ((query_weight, q, 0), (key_weight, k, heads)):
            if part.numel():
                here = x[:, first * size :]
                _call(
                    "rotate_heads", here, x.shape[1], weight, ctx.epsilon, cosines, sines, part, *part.shape
                )  # fmt: skip
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

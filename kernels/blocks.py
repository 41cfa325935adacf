"""What a decoder block does between its matrix products: RMS norm, SwiGLU, heads; and the way back.

Each is one pass over memory, in C++ on a CPU and a Triton kernel on a GPU (`kernels.gpu.blocks`), and its gradient with
respect to the input another; weights are frozen here, so there is no other gradient, and no autograd: what a gradient
reads is handed to it. Tensors are contiguous, float32 or bfloat16 (on a GPU float16 too), all of a call in one dtype
but for cosines and sines, which are float32; arithmetic is float32, and what is stored is rounded once. Where `runs(x)`
says no (another device or dtype, no compiler), callers keep the plain expression of their model, with the rounding of
the published one.

Shapes: S tokens, width d, H heads and Hkv key heads of `size` channels.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import NamedTuple, cast

import torch
from torch import Tensor

from kernels.cpp.build import DTYPES, call
from kernels.cpp.build import runs as cpp_runs
from kernels.settings import has_triton, settings

MAX_HEAD_SIZE = 1024  # of the C++ passes' buffers
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Tensors = tuple[Tensor, Tensor, Tensor]


def runs(x: Tensor) -> bool:
    """Whether the passes below take x. KERNELS_BACKEND=reference or torch turns them off with the other kernels."""
    if x.numel() == 0 or torch.compiler.is_compiling():
        return False
    if x.is_cuda:
        return x.dtype in GPU_DTYPES and has_triton() and not settings().plain
    return x.device.type == "cpu" and x.dtype in DTYPES and cpp_runs()


@functools.cache
def _gpu() -> ModuleType:
    """The same passes on a GPU; triton may be missing."""
    from kernels.gpu import blocks

    return blocks


def add_rms_norm(x: Tensor, added: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """total = x + added (x itself where there is nothing to add), total / sqrt(mean(total^2) + epsilon) * weight over
    the last axis of both (S, d); and 1 / sqrt(...), (S,) float32."""
    if x.is_cuda:
        return cast(Tensors, _gpu().add_rms_norm(x, added, weight, epsilon))
    total = x if added is None else torch.empty_like(x)
    out, inverse = torch.empty_like(x), torch.empty(x.shape[0])
    call("add_rms_norm", x, added, weight, total, out, inverse, *x.shape, float(epsilon), *_how(x))
    return total, out, inverse


def rms_norm_gradient(g: Tensor, total: Tensor, weight: Tensor, inverse: Tensor, more: Tensor | None) -> Tensor:
    """The gradient of `total` (S, d) from that of the normalised one, g (S, d), and `more` added to it: the gradient of
    what goes past the norm."""
    if g.is_cuda:
        return cast(Tensor, _gpu().rms_norm_gradient(g, total, weight, inverse, more))
    out = torch.empty_like(total)
    call("rms_norm_gradient", g, total, weight, inverse, more, out, *total.shape, *_how(g))
    return out


def swiglu(wide: Tensor) -> Tensor:
    """silu(gate) * up of (S, 2 m), which holds [gate, up] -> (S, m)."""
    if wide.is_cuda:
        return cast(Tensor, _gpu().swiglu(wide))
    out = wide.new_empty(wide.shape[0], wide.shape[1] // 2)
    call("swiglu", wide, wide[:, out.shape[1] :], wide.shape[1], out, *out.shape, *_how(wide))
    return out


def swiglu_apart(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of two tensors (S, m), on a CPU; the result takes the place of `gate`."""
    call("swiglu", gate, up, gate.shape[1], gate, *gate.shape, *_how(gate))
    return gate


def swiglu_gradient(g: Tensor, wide: Tensor) -> Tensor:
    """The gradient of `wide` (S, 2 m) from that of its `swiglu`, g (S, m)."""
    if g.is_cuda:
        return cast(Tensor, _gpu().swiglu_gradient(g, wide))
    out = torch.empty_like(wide)
    call("swiglu_gradient", g, wide, out, *g.shape, *_how(g))
    return out


class Turn(NamedTuple):
    """What the heads of q and k go through: each is normalised where it has a weight (size,), then rotated by cosines
    and sines (S, size / 2), channel i with channel i + size / 2."""

    query_weight: Tensor | None
    key_weight: Tensor | None
    epsilon: float
    cosines: Tensor
    sines: Tensor


def split_heads(x: Tensor, heads: int, key_heads: int, turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
    """q (S, H, size), k and v (S, Hkv, size) of stacked projections x (S, (H + 2 Hkv) size); H or Hkv may be 0.
    ValueError for heads wider than `MAX_HEAD_SIZE`."""
    if x.is_cuda:
        return cast(Tensors, _gpu().split_heads(x, heads, key_heads, turn))
    rows, size = x.shape[0], 2 * turn.cosines.shape[1]
    if size > MAX_HEAD_SIZE:
        raise ValueError(f"heads of {size} channels; at most {MAX_HEAD_SIZE}")
    q, k = x.new_empty(rows, heads, size), x.new_empty(rows, key_heads, size)
    v = torch.empty_like(k)
    call("split_heads", x, *turn, q, k, v, rows, heads, key_heads, size, *_how(x))
    return q, k, v


def split_heads_gradient(g_q: Tensor, g_k: Tensor, g_v: Tensor, x: Tensor, turn: Turn) -> Tensor:
    """The gradient of x from those of its `split_heads`."""
    if x.is_cuda:
        return cast(Tensor, _gpu().split_heads_gradient(g_q, g_k, g_v, x, turn))
    out = torch.empty_like(x)
    heads, key_heads, size = g_q.shape[1], g_k.shape[1], g_q.shape[2]
    call("split_heads_gradient", g_q, g_k, g_v, x, *turn, out, x.shape[0], heads, key_heads, size, *_how(x))
    return out


def _how(x: Tensor) -> tuple[int, int]:
    """The last arguments of every pass: the tensors' dtype, and threads."""
    return DTYPES[x.dtype], torch.get_num_threads()

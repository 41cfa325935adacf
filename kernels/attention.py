"""Attention of packed rows of different lengths that continue cached prefixes, in one C++ pass on a CPU.

scaled_dot_product_attention wants rectangles: rows of one length, prefixes of one length, and masks where they differ.
Here every row says where its queries, its own keys and the pieces of its prefix lie, and nothing is padded, gathered or
computed past a causal row's diagonal. The gradient of queries, own keys and own values is another pass; prefixes have
none. Tensors are float32 or bfloat16, arithmetic is float32. It is what `kernels.varlen` calls "cpp".

Shapes: H query heads, Hkv key heads (a divisor), `size` channels a head.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kernels.cpp.build import DTYPES, call
from kernels.cpp.build import runs as runs

Piece = tuple[Tensor, Tensor]
"""Cached keys and values of n tokens, (Hkv, n, size) each, contiguous."""


class _Sequence(ctypes.Structure):
    """`struct Sequence` of attention.h."""

    _fields_ = [
        (name, ctypes.c_int64) for name in ("q_start", "q_count", "k_start", "k_count", "first_piece", "pieces")
    ]


class _Piece(ctypes.Structure):
    """`struct Piece` of attention.h."""

    _fields_ = [("keys", ctypes.c_void_p), ("values", ctypes.c_void_p), ("length", ctypes.c_int64)]


class _Attention(ctypes.Structure):
    """`struct Attention` of attention.h."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("q", "k", "v", "rows", "pieces")]
        + [(name, ctypes.c_int64) for name in ("row_count", "heads", "key_heads", "size")]
        + [("scale", ctypes.c_float)]
        + [(name, ctypes.c_int32) for name in ("causal", "dtype", "threads")]
    )


class Rows:
    """B rows: each one's queries, own keys, and the pieces before them (by index, first tokens first).

    queries and keys: lengths (B,); rows follow each other in q, and in k and v. A row also has the keys of `before`
    (B,) tokens directly before its own; then there is no gradient. ValueError where a row has fewer keys (its pieces'
    `lengths` included) than queries, or the numbers differ.
    """

    def __init__(
        self,
        queries: Sequence[int],
        keys: Sequence[int],
        pieces: Sequence[Sequence[int]] | None = None,
        lengths: Sequence[int] = (),
        before: Sequence[int] = (),
    ) -> None:
        pieces = [()] * len(keys) if pieces is None else pieces
        before = before or (0,) * len(keys)
        if not len(queries) == len(keys) == len(pieces) == len(before) or not queries:
            raise ValueError(f"{len(queries)} rows of queries, {len(keys)} of keys, {len(pieces)} of pieces")
        self.queries, self.keys, self.overlap = sum(queries), sum(keys), any(before)
        self.lengths = [lengths[index] for row in pieces for index in row]
        self.order = [index for row in pieces for index in row]
        self._rows = (_Sequence * len(keys))()
        q_start = k_start = first = 0
        for row, q_count, k_count, own, seen in zip(self._rows, queries, keys, pieces, before, strict=True):
            row.q_start, row.q_count, row.k_start, row.k_count = q_start, q_count, k_start - seen, k_count + seen
            row.first_piece, row.pieces = first, len(own)
            if min(q_count, k_count, row.k_start) < 0 or row.k_count + sum(lengths[index] for index in own) < q_count:
                raise ValueError(f"{q_count} queries for {k_count} keys of its own and pieces {list(own)}")
            q_start, k_start, first = q_start + q_count, k_start + k_count, first + len(own)

    def arguments(
        self, q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[Piece], causal: bool, scale: float
    ) -> tuple[_Attention, Any]:
        """The C++ arguments, and what must stay alive as long as they."""
        table = (_Piece * max(1, len(self.order)))()
        for entry, index, length in zip(table, self.order, self.lengths, strict=False):
            keys, values = pieces[index]
            entry.keys, entry.values, entry.length = keys.data_ptr(), values.data_ptr(), length
        arguments = _Attention(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), ctypes.addressof(self._rows), ctypes.addressof(table),
            len(self._rows), q.shape[1], k.shape[1], q.shape[2], scale, causal,
            DTYPES[q.dtype], torch.get_num_threads(),
        )  # fmt: skip
        return arguments, table


Layout: TypeAlias = tuple[Rows, Sequence[Piece], bool, float]
"""Rows, the pieces that they name, whether they are causal, and the scale of scores."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Rows,
    pieces: Sequence[Piece] = (),
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale q k^T) v in each row: q (queries, H, size), k and v (keys, Hkv, size) -> (queries, H, size),
    differentiable with respect to the three. All of them, and the pieces, are on the CPU and in one of `DTYPES`.

    With `causal` a row's last query sees all of its keys, the one before all but the last, and so on. `scale` None is
    1 / sqrt(size). `pieces` is what the rows' indices mean. ValueError where shapes or dtypes do not fit.
    """
    heads, key_heads, size = q.shape[1], k.shape[1], q.shape[2]
    if q.shape[0] != rows.queries or k.shape != (rows.keys, key_heads, size) or v.shape != k.shape or heads % key_heads:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} for {rows.queries} queries")
    for x in (q, k, v, *chain.from_iterable(pieces)):
        if x.dtype != q.dtype or x.dtype not in DTYPES or x.device.type != "cpu":
            raise ValueError(f"one of {tuple(DTYPES)} on the CPU is wanted, not {x.dtype} on {x.device}")
    for keys, values in pieces:
        if keys.shape[::2] != (key_heads, size) or values.shape != keys.shape:
            raise ValueError(f"a piece of keys {tuple(keys.shape)} and values {tuple(values.shape)}")
        if not (keys.is_contiguous() and values.is_contiguous()):
            raise ValueError("a piece of keys or values that is not contiguous")
    for index, length in zip(rows.order, rows.lengths, strict=True):
        if pieces[index][0].shape[1] != length:
            raise ValueError(f"piece {index} has {pieces[index][0].shape[1]} tokens, not {length}")
    layout: Layout = rows, pieces, causal, size**-0.5 if scale is None else scale
    if not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)):
        return forward(q, k, v, layout)[0]
    if rows.overlap:
        raise ValueError("rows that share keys have no gradient")
    out: Tensor = _Attend.apply(q, k, v, layout)  # type: ignore[no-untyped-call]
    return out


def forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """`attend` without its checks and without autograd; beside it what `gradient` reads, (queries, H) float32."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out, log_sums = torch.empty_like(q), torch.empty(q.shape[:2])
    rows, pieces, causal, scale = layout
    arguments, _table = rows.arguments(q, k, v, pieces, causal, scale)
    call("attention", ctypes.byref(arguments), out, log_sums)
    return out, log_sums


def gradient(
    g: Tensor, out: Tensor, log_sums: Tensor, q: Tensor, k: Tensor, v: Tensor, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of q, k and v (contiguous) from that of `forward`, g, and from what it returned."""
    written = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    rows, pieces, causal, scale = layout
    arguments, _table = rows.arguments(q, k, v, pieces, causal, scale)
    call("attention_gradient", ctypes.byref(arguments), g.contiguous(), out, log_sums, *written)
    return written


class _Attend(torch.autograd.Function):
    """`forward` and `gradient` for autograd."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, log_sums = forward(q, k, v, layout)
        ctx.save_for_backward(out, log_sums, q, k, v)
        ctx.layout = layout
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (out, log_sums, q, k, v) = gradients, ctx.saved_tensors
        return *gradient(g, out, log_sums, q, k, v, ctx.layout), None

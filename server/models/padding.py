"""Ragged batches on a small number of shapes: what a CUDA graph, recorded once a shape, needs.

Tokens, rows, the number of sequences and the longest one are each rounded up to a power of two or the half between two.
The tokens too many are sequences of their own behind the real ones, so no real token sees them; the sequences too many
are empty; the rows too many read the first token again. So real rows come out as without padding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from kernels.recording import bucket
from kernels.transfer import upload
from server.models.packing import PackedLayout


@dataclass(frozen=True, slots=True)
class Shape:
    """A bucket: S tokens in B sequences of at most `longest` tokens, N rows."""

    tokens: int
    sequences: int
    longest: int
    rows: int


def shape_of(layout: PackedLayout, rows: int) -> Shape:
    """The bucket of a batch that asks for so many rows."""
    tokens, longest = bucket(layout.tokens), bucket(layout.max_length)
    sequences = len(layout.lengths) + -(-(tokens - layout.tokens) // longest)
    return Shape(tokens, bucket(sequences), longest, bucket(rows))


def pad(tokens: Tensor, layout: PackedLayout, rows: Tensor, shape: Shape) -> tuple[Tensor, PackedLayout, Tensor]:
    """Tokens (S,), their layout and rows (N,) at the size of a bucket that holds them, on the same device."""
    surplus = shape.tokens - layout.tokens
    whole, rest = divmod(surplus, shape.longest)
    lengths = (*layout.lengths, *[shape.longest] * whole, *[rest] * bool(rest))
    padded = PackedLayout.of(lengths, layout.positions.device)
    empty = torch.full((shape.sequences - len(lengths),), shape.tokens, dtype=torch.int32)
    cu_seqlens = torch.cat((padded.cu_seqlens, upload(empty, padded.cu_seqlens.device)))
    return (
        functional.pad(tokens, (0, surplus)),
        replace(padded, cu_seqlens=cu_seqlens, max_length=shape.longest),
        functional.pad(rows, (0, shape.rows - len(rows))),
    )

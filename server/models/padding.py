"""Packed layouts on a small number of shapes: what a CUDA graph, recorded once a shape, needs.

Rows, tokens, keys, the longest row and the indices that are read are each rounded up (`kernels.recording`). The tokens
too many are rows of their own after the real ones, with one token each at least: nothing real sees them, they see
nothing real, and since every query has a key, their numbers are finite and their gradients their own. Keys too many
belong to no row; they are copies of a cached one, whose gradient nobody takes. Indices too many read the first token
again. So what is real comes out as without padding.

Cached keys and values are in one fixed place, the `Arena`, since a graph cannot follow them from one conversation to
the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kernels.recording import bucket, coarse_bucket
from kernels.transfer import upload
from server.models.packing import EMPTY_PREFIX, PackedLayout, Prefix
from server.types import DecoderShape

LEAST_LONGEST, LEAST_KEYS = 64, 256
"""Buckets of a row's own tokens or keys, and of all keys or cached tokens, begin here."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A bucket: B rows of S own tokens, `longest` at most; T keys (0 where no row has a prefix), `longest_keys` at most
    a row; P cached tokens; N indices that are read; whether rows have hidden tokens."""

    rows: int
    tokens: int
    longest: int
    keys: int
    longest_keys: int
    cached: int
    read: int
    hiding: bool


def cached_tokens(layout: PackedLayout) -> int:
    """How many tokens the rows' prefixes are of, each counted once."""
    return sum(link.own for link in layout.links)


def shape_of(layout: PackedLayout, read: int = 0) -> Shape:
    """The bucket of a layout of which `read` indices are read: fine where a token too many runs through every layer,
    coarse where it is an index, a copy or a bound."""
    real, tokens, longest = len(layout.lengths), layout.tokens, coarse_bucket(layout.longest, LEAST_LONGEST)
    count = coarse_bucket(real + 1)
    padded = bucket(tokens + count - real)
    while padded - tokens > (count - real) * longest:
        count *= 2
        padded = bucket(tokens + count - real)
    keys = cached = 0
    longest_keys = longest
    if layout.gather is not None:
        keys = coarse_bucket(len(layout.gather) + padded - tokens, LEAST_KEYS)
        longest_keys = coarse_bucket(layout.longest_keys, LEAST_LONGEST)
        cached = coarse_bucket(cached_tokens(layout), LEAST_KEYS)
    hiding = layout.visible is not None
    return Shape(count, padded, longest, keys, longest_keys, cached, bucket(read) if read else 0, hiding)


@dataclass(frozen=True, slots=True)
class Inputs:
    """All that a pass over a layout reads beside weights: x (S,) tokens or (S, D) embeddings, the layout, and indices
    (N,) int64 that are read."""

    x: Tensor
    layout: PackedLayout
    rows: Tensor

    def tensors(self) -> list[Tensor]:
        """Those whose values differ from pass to pass."""
        of = self.layout
        every = (self.x, self.rows, of.positions, of.cu_q, of.cu_k, of.gather, of.visible)
        return [x for x in every if x is not None]

    def copy_(self, other: Inputs) -> None:
        """Take the values of other inputs of the same shape."""
        for here, there in zip(self.tensors(), other.tensors(), strict=True):
            here.copy_(there)


def pad(x: Tensor, layout: PackedLayout, rows: Tensor, shape: Shape, cached: Prefix = EMPTY_PREFIX) -> Inputs:
    """Inputs at the size of the bucket that holds them, on their device; `cached` is where the tokens of all prefixes
    are (`Arena.prefix`)."""
    device, real = layout.cu_q.device, len(layout.lengths)
    surplus, count = shape.tokens - layout.tokens, shape.rows - real
    each, more = divmod(surplus, count)
    lengths = [each + 1] * more + [each] * (count - more)
    ends = upload(torch.tensor(lengths).cumsum(0).int(), device)
    gather, cu_k = layout.gather, layout.cu_k
    cu_q = torch.cat([layout.cu_q, layout.tokens + ends])
    if gather is None:
        cu_k = cu_q
    else:
        own, keys = cached_tokens(layout), len(gather)
        moved = torch.where(gather < own, gather, gather + (shape.cached - own))
        fill = torch.arange(shape.cached + layout.tokens, shape.cached + shape.tokens, device=device)
        gather = functional.pad(torch.cat([moved, fill]), (0, shape.keys - keys - surplus))
        cu_k = torch.cat([cu_k, keys + ends])
    visible = layout.visible
    if visible is not None:
        visible = torch.cat([visible, upload(torch.tensor(lengths), device)])
    padded = PackedLayout(
        lengths=(*layout.lengths, *lengths),
        prefixes=(),
        links=(cached,) if shape.cached else (),
        causal=layout.causal,
        positions=functional.pad(layout.positions, (0, surplus)),
        cu_q=cu_q,
        cu_k=cu_k,
        gather=gather,
        longest=shape.longest,
        longest_keys=shape.longest_keys,
        before=(0,) * shape.rows,
        visible=visible,
    )
    x = functional.pad(x, (0,) * (2 * x.ndim - 1) + (surplus,))
    return Inputs(x, padded, functional.pad(rows, (0, shape.read - len(rows))))


class Arena:
    """Room for the cached keys and values of `tokens` tokens, (Hkv, tokens, d) a layer each."""

    def __init__(self, model: DecoderShape, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        size = (2, model.layers, model.key_heads, tokens, model.head_size)
        self._both = torch.zeros(size, dtype=dtype, device=device)
        self._held: Sequence[Prefix] = ()
        self.tokens = tokens

    def hold(self, links: Sequence[Prefix]) -> None:
        """Copy the tokens of `links` here, one link after another, unless they are what was copied last."""
        if links is self._held or not links:
            return
        self._held = ()
        for which, place in zip(("keys", "values"), self._both, strict=True):
            for layer, there in enumerate(place):
                pieces = torch.cat([getattr(link, which)[layer] for link in links], dim=1)
                there[:, : pieces.shape[1]].copy_(pieces)
        self._held = links

    def prefix(self, tokens: int) -> Prefix:
        """The first so many tokens, whatever they are."""
        keys, values = (tuple(layer[:, :tokens] for layer in place) for place in self._both)
        return Prefix(tokens, keys, values)

"""Packed layouts on a small number of shapes: what a CUDA graph, recorded once a shape, needs.

Rows, tokens, keys and the longest row are each rounded up (`kernels.recording`). The tokens too many are rows of their
own after the real ones, with one token each at least: nothing real sees them, they see nothing real, and since every
query has a key, their numbers are finite and their gradients their own. What they hold is whatever an earlier pass
left. Keys too many belong to no row; they are copies of a cached one, whose gradient nobody takes. So what is real
comes out as without padding.

Cached keys and values are in one fixed place, the `Arena`, since a graph cannot follow them from one conversation to
the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import ref

import torch
from torch import Tensor

from kernels.recording import bucket, coarse_bucket
from server.models.packing import EMPTY_PREFIX, PackedLayout, Prefix
from server.types import DecoderShape

LEAST_LONGEST, LEAST_KEYS = 64, 256
"""Buckets of a row's own tokens or keys, and of all keys or cached tokens, begin here."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A bucket: B rows of S own tokens, `longest` at most; T keys (0 where no row has a prefix), `longest_keys` at most
    a row; P cached tokens; whether rows are causal, and whether they have hidden tokens."""

    rows: int
    tokens: int
    longest: int
    keys: int
    longest_keys: int
    cached: int
    causal: bool
    hiding: bool


def cached_tokens(layout: PackedLayout) -> int:
    """How many tokens the rows' prefixes are of, each counted once."""
    return sum(link.own for link in layout.links)


def shape_of(layout: PackedLayout) -> Shape:
    """The bucket of a layout: fine where a token too many runs through every layer, coarse where it is an index, a copy
    or a bound."""
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
    return Shape(count, padded, longest, keys, longest_keys, cached, layout.causal, layout.visible is not None)


class Inputs:
    """The memory of a bucket, on one device: all that a pass reads beside weights. x (S, ...) are tokens or embeddings
    like `x`; `cached` is where the tokens of all prefixes are (`Arena.prefix`)."""

    def __init__(self, shape: Shape, x: Tensor, cached: Prefix, device: torch.device) -> None:
        def zeros(size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        edges = zeros(shape.rows + 1, torch.int32)
        self.x = torch.zeros(shape.tokens, *x.shape[1:], dtype=x.dtype, device=device)
        self.layout = PackedLayout(
            lengths=(),
            prefixes=(),
            links=(cached,) if shape.cached else (),
            causal=shape.causal,
            positions=zeros(shape.tokens, torch.int64),
            cu_q=edges,
            cu_k=torch.zeros_like(edges) if shape.keys else edges,
            gather=zeros(shape.keys, torch.int64) if shape.keys else None,
            longest=shape.longest,
            longest_keys=shape.longest_keys,
            before=(),
            visible=zeros(shape.rows, torch.int64) if shape.hiding else None,
        )
        self._rows: tuple[object, ...] = ()  # the lengths of those that are here, and their prefixes

    def fill(self, x: Tensor, layout: PackedLayout) -> None:
        """Take a pass over a layout of this bucket. Where the rows lie is written only when the last pass had others:
        most differ in what their tokens are, and in nothing else. Nothing is uploaded."""
        here, real, tokens = self.layout, len(layout.lengths), layout.tokens
        self.x[:tokens].copy_(x)
        here.positions[:tokens].copy_(layout.positions)
        if here.visible is not None and layout.visible is not None:
            here.visible[:real].copy_(layout.visible)
        rows = layout.lengths, [ref(prefix) for prefix in layout.prefixes]
        if self._rows == rows:
            return
        self._rows = ()  # until all is written
        surplus, count = len(here.positions) - tokens, len(here.cu_q) - 1 - real
        each, more = divmod(surplus, count)
        number = torch.arange(1, count + 1, dtype=torch.int32, device=here.cu_q.device)
        ends = number * each + number.clamp(max=more)
        here.cu_q[: real + 1].copy_(layout.cu_q)
        torch.add(ends, tokens, out=here.cu_q[real + 1 :])
        if here.visible is not None:
            torch.add(number <= more, each, out=here.visible[real:])
        if here.gather is not None and layout.gather is not None:
            keys, own, room = len(layout.gather), cached_tokens(layout), cached_tokens(here)
            here.cu_k[: real + 1].copy_(layout.cu_k)
            torch.add(ends, keys, out=here.cu_k[real + 1 :])
            here.gather[:keys].copy_(torch.where(layout.gather < own, layout.gather, layout.gather + (room - own)))
            torch.arange(room + tokens, room + tokens + surplus, out=here.gather[keys : keys + surplus])
            here.gather[keys + surplus :].zero_()
        self._rows = rows


class Arena:
    """Room for the cached keys and values of `tokens` tokens in every layer."""

    def __init__(self, model: DecoderShape, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        size = (model.layers, 2, tokens, model.key_heads, model.head_size)  # a token's heads lie together
        self._both = torch.zeros(size, dtype=dtype, device=device)
        self._held: list[ref[Prefix]] = []
        self.tokens = tokens

    def hold(self, links: Sequence[Prefix]) -> None:
        """Copy the tokens of `links` here, one link after another, but for the first that are here already."""
        start, same = 0, True
        held, self._held = self._held, []
        for index, link in enumerate(links):
            same = same and index < len(held) and held[index]() is link
            if link.both is not None and not same:
                self._both[:, :, start : start + link.own].copy_(link.both.transpose(2, 3))
            start += link.own
        self._held = [ref(link) for link in links]

    def prefix(self, tokens: int) -> Prefix:
        """The first so many tokens, whatever they are."""
        return Prefix(tokens, self._both[:, :, :tokens].transpose(2, 3)) if tokens else EMPTY_PREFIX

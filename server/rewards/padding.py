"""Packed reward rows on a small number of shapes: what a CUDA graph, recorded once a shape, needs.

Rows, tokens, keys and the longest row of each are rounded up (`kernels.recording`). The tokens too many are rows
of their own behind the real ones, one token each at least: nothing real sees them, they see nothing real, and every
query has a key, so their numbers are finite and their gradients their own. Keys too many belong to no row; they are
copies of a cached one, whose gradient nobody takes.

Cached keys and values are in one fixed place, the `Arena`, since a graph cannot follow them from one conversation to
the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional

from kernels.recording import bucket, coarse_bucket
from kernels.transfer import upload
from kernels.varlen import Spans
from server.rewards.attention import Packing, Prefix
from server.rewards.varlen import Cached, VarlenRows
from server.types import DecoderShape

LEAST_LONGEST, LEAST_KEYS = 64, 256
"""Buckets of a row's own tokens or keys, and of all keys or cached tokens, begin here."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A bucket: B rows of S own tokens, `longest` at most; T keys, `longest_keys` at most a row; P cached tokens."""

    rows: int
    tokens: int
    longest: int
    keys: int
    longest_keys: int
    cached: int


@dataclass(frozen=True, slots=True)
class Inputs:
    """All that a pass over padded rows reads beside weights and cached tokens: embeddings (S, D) at positions (S,), and
    the tensors of a packing with hidden tokens (`Packing.hiding`)."""

    embeds: Tensor
    positions: Tensor
    lasts: Tensor  # (B,)
    hidden: Tensor  # (S,)
    gather: Tensor  # (T,)
    cu_q: Tensor  # (B + 1,)
    cu_k: Tensor  # (B + 1,)
    last_cu_k: Tensor  # (2 B + 1,)

    def copy_(self, other: Inputs) -> None:
        """Take the values of other inputs of the same shape."""
        for field in fields(self):
            getattr(self, field.name).copy_(getattr(other, field.name))

    def packing(self, shape: Shape, cached: Prefix, backend: str) -> Packing:
        """What `RewardModel.read` takes; `cached` holds `shape.cached` tokens."""
        edges = torch.arange(2 * shape.rows + 1, dtype=self.cu_q.dtype, device=self.cu_q.device)
        rows = VarlenRows(
            backend,
            (cached,),
            self.gather,
            Spans(self.cu_q, self.cu_k, shape.longest, shape.longest_keys),
            Spans((edges + 1) // 2, self.last_cu_k, 1, shape.longest_keys),
            shape.tokens,
        )
        return Packing((), None, None, self.lasts, None, None, varlen=rows, hidden=self.hidden)


def cached_tokens(rows: VarlenRows) -> int:
    """How many tokens the rows' prefixes are of, each counted once."""
    return sum(link.keys[0].shape[1] for link in rows.links)


def shape_of(rows: VarlenRows) -> Shape:
    """The bucket of some rows: fine where a token too many runs through every layer, coarse where it is an index, a
    copy or a bound."""
    real, tokens, longest = len(rows.rows.cu_q) - 1, rows.tokens, coarse_bucket(rows.rows.max_q, LEAST_LONGEST)
    count = coarse_bucket(real + 1)
    padded = bucket(tokens + count - real)
    while padded - tokens > (count - real) * longest:
        count *= 2
        padded = bucket(tokens + count - real)
    keys = coarse_bucket(len(rows.gather) + padded - tokens, LEAST_KEYS)
    longest_keys = coarse_bucket(rows.rows.max_k, LEAST_LONGEST)
    return Shape(count, padded, longest, keys, longest_keys, coarse_bucket(cached_tokens(rows), LEAST_KEYS))


def pad(packing: Packing, positions: Tensor, embeds: Tensor, shape: Shape) -> Inputs:
    """Rows with hidden tokens, at positions (S,) with embeddings (S, D), at the size of the bucket that holds them.
    ValueError for a packing without hidden tokens, or not of a variable-length attention."""
    rows, hidden = packing.varlen, packing.hidden
    if not isinstance(rows, VarlenRows) or hidden is None:
        raise ValueError("only rows with hidden tokens are padded (Packing.hiding)")
    device = rows.gather.device
    surplus, count = shape.tokens - rows.tokens, shape.rows - len(packing.lasts)
    each, more = divmod(surplus, count)
    ends = upload(torch.tensor([each + 1] * more + [each] * (count - more)).cumsum(0).int(), device)
    cached, keys = cached_tokens(rows), len(rows.gather)
    moved = torch.where(rows.gather < cached, rows.gather, rows.gather + (shape.cached - cached))
    own = torch.arange(shape.cached + rows.tokens, shape.cached + shape.tokens, device=device)
    return Inputs(
        embeds=functional.pad(embeds, (0, 0, 0, surplus)),
        positions=functional.pad(positions, (0, surplus)),
        lasts=torch.cat([packing.lasts, (rows.tokens - 1 + ends).long()]),
        hidden=functional.pad(hidden, (0, surplus)),
        gather=functional.pad(torch.cat([moved, own]), (0, shape.keys - keys - surplus)),
        cu_q=torch.cat([rows.rows.cu_q, rows.tokens + ends]),
        cu_k=torch.cat([rows.rows.cu_k, keys + ends]),
        last_cu_k=torch.cat([rows.lasts.cu_k, torch.stack([keys + ends] * 2, dim=1).flatten()]),
    )


class Arena:
    """Room for the cached keys and values of `tokens` tokens, (Hkv, tokens, d) a layer each."""

    def __init__(self, model: DecoderShape, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        size = (2, model.layers, model.key_heads, tokens, model.head_size)
        self._both = torch.zeros(size, dtype=dtype, device=device)
        self._held: Sequence[Cached] | None = None
        self.tokens = tokens

    def hold(self, links: Sequence[Cached]) -> None:
        """Copy the tokens of `links` here, one link behind another, unless they are what was copied last."""
        if links is self._held:
            return
        self._held = None
        if links:
            for keys_or_values, place in zip(("keys", "values"), self._both, strict=True):
                for layer, there in enumerate(place):
                    pieces = torch.cat([getattr(link, keys_or_values)[layer] for link in links], dim=1)
                    there[:, : pieces.shape[1]].copy_(pieces)
        self._held = links

    def prefix(self, tokens: int) -> Prefix:
        """The first so many tokens, whatever they are."""
        keys, values = (tuple(layer[:, :tokens] for layer in place) for place in self._both)
        return Prefix(tokens, keys, values)

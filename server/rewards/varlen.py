"""The attention of packed rows behind cached prefixes as one variable-length kernel: no rectangles, no masks.

A row's keys are its prefix's and then its own, so its queries are the last ones of a causal sequence: just what the
kernels of `kernels.varlen` compute. They want each row's keys in one piece; one gather a layer lays them out so,
from the different prefixes and the rows' own keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels import varlen
from kernels.transfer import upload

IntArray = NDArray[np.int64]


class Cached(Protocol):
    """`attention.Prefix`: `length` tokens, of which those behind its parent's have their keys and values here,
    (Hkv, own, d) a layer."""

    @property
    def length(self) -> int: ...

    @property
    def keys(self) -> tuple[Tensor, ...]: ...

    @property
    def values(self) -> tuple[Tensor, ...]: ...

    @property
    def parent(self) -> Cached | None: ...


def chain(prefix: Cached) -> list[Cached]:
    """A prefix's ancestors and itself, the first tokens first; empty ones left out."""
    links: list[Cached] = []
    link: Cached | None = prefix
    while link is not None and link.length:
        links.append(link)
        link = link.parent
    return links[::-1]


@dataclass(frozen=True, slots=True, eq=False)
class VarlenRows:
    """B rows of S = `tokens` own tokens. `gather` (T,) holds for each key of each row its place among the tokens of
    `links` and then the rows' own; `rows` are the spans of all queries, `lasts` those of each row's last token alone.
    Both read T keys."""

    backend: str
    links: tuple[Cached, ...]
    gather: Tensor
    rows: varlen.Spans
    lasts: varlen.Spans
    tokens: int

    @classmethod
    def of(cls, prefixes: Sequence[Cached], lengths: Sequence[int], device: torch.device, backend: str) -> VarlenRows:
        """Of rows of `lengths` own tokens, each behind its prefix. `backend`: as `kernels.varlen.choose` gave it."""
        places: dict[int, IntArray] = {}  # of each link's own tokens
        links: list[Cached] = []
        place = 0
        for prefix in prefixes:
            for link in chain(prefix):
                if id(link) not in places:
                    own = link.length - (link.parent.length if link.parent is not None else 0)
                    places[id(link)] = np.arange(place, place + own)
                    links.append(link)
                    place += own
        gather = []
        for prefix, length in zip(prefixes, lengths, strict=True):
            gather += [places[id(link)] for link in chain(prefix)]
            gather.append(np.arange(place, place + length))
            place += length
        keys = [prefix.length + length for prefix, length in zip(prefixes, lengths, strict=True)]
        return cls(
            backend,
            tuple(links),
            upload(torch.from_numpy(np.concatenate(gather)), device),
            varlen.Spans.of(lengths, keys, device),
            varlen.Spans.of([1] * len(keys), keys, device),
            sum(lengths),
        )

    def hiding(self, visible: Tensor) -> VarlenRows:
        """The same rows, read at their last visible token where the first `visible` (B,) int64 of each row's own tokens
        are, one at least. Only the device knows that number: what is hidden is a sequence of keys that nobody asks."""
        lengths, ends = self.rows.cu_q.diff(), self.rows.cu_k[1:]
        seen = ends - lengths + visible.to(ends.dtype)
        cu_k = torch.cat([self.rows.cu_k[:1], torch.stack([seen, ends], dim=1).flatten()])
        cu_q = (torch.arange(len(cu_k), dtype=cu_k.dtype, device=cu_k.device) + 1) // 2  # 0, 1, 1, 2, 2, ...
        return replace(self, lasts=varlen.Spans(cu_q, cu_k, 1, self.lasts.max_k))

    def last_and_hidden(self, visible: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the S tokens is each row's last visible one, (B,), and which are hidden, (S,)."""
        starts, lengths = self.rows.cu_q[:-1].long(), self.rows.cu_q.diff()
        lasts = starts + visible - 1
        of_row = torch.repeat_interleave(lasts, lengths, output_size=self.tokens)
        return lasts, torch.arange(self.tokens, device=lasts.device) > of_row

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, *, last: bool
    ) -> Tensor:
        """query (S, H, d), or with `last` (B, H, d), key and value (S, Hkv, d) -> the query's shape."""
        k = self._laid_out([link.keys[layer] for link in self.links], key)
        v = self._laid_out([link.values[layer] for link in self.links], value)
        spans = self.lasts if last else self.rows
        return varlen.attend(self.backend, query.contiguous(), k, v, spans, causal=True, scale=scale)

    def _laid_out(self, cached: list[Tensor], own: Tensor) -> Tensor:
        return torch.cat([*(x.transpose(0, 1) for x in cached), own]).index_select(0, self.gather)

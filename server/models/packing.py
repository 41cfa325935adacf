"""Ragged batches without padding: rows of tokens lie one after another in one packed axis.

Linear layers and norms work on packed tokens (S, ...) and never see where a row ends. Only attention does: it gets the
`PackedLayout`. A token sees its own row, with `causal` only up to itself, and before that the whole of the cached
prefix that its row continues, if it continues one. A row may also see tokens that are packed directly before it: so the
blocks of a block-causal sequence are rows one after another, and a model needs no mask for them. Diffusion models run
canvases in both directions; reward models run causal rows that continue cached conversations. A packed forward equals
the same rows one at a time, up to rounding.

Three ways compute the same attention. "cpp" (`kernels.attention`) reads prefixes where they lie and is the CPU's way.
The kernels of `kernels.varlen` want each row's keys in one piece, so one gather a layer lays them out. "sdpa" is their
plain form, one row at a time, for whatever the other two cannot do: float64, a GPU in 32 bits, no C++ compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, groupby
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from kernels import attention, varlen
from kernels.transfer import upload

if TYPE_CHECKING:
    from server.models.lora import Adapter, Run

IntArray = NDArray[np.int64]

Attention = Callable[..., Tensor]
"""layer, q (S, H, d), k and v (S, Hkv, d) -> (S, H, d), for one layout: `attend` with layout and backend given."""


@dataclass(frozen=True, eq=False)
class Prefix:
    """Cached keys and values of `length` tokens in one tensor `both` (layers, 2, Hkv, own, d), None where nothing is
    held; the keys carry their positions.

    With a `parent`, its tokens come first and are not held again: K answers to one conversation share the parent.
    """

    length: int
    both: Tensor | None = None
    parent: Prefix | None = None

    @cached_property
    def keys(self) -> tuple[Tensor, ...]:
        """(Hkv, own, d) a layer."""
        return () if self.both is None else self.both[:, 0].unbind()

    @cached_property
    def values(self) -> tuple[Tensor, ...]:
        """(Hkv, own, d) a layer."""
        return () if self.both is None else self.both[:, 1].unbind()

    @property
    def own(self) -> int:
        """How many tokens are held here and not in the parent."""
        return self.length - (self.parent.length if self.parent is not None else 0)

    def chain(self) -> list[Prefix]:
        """The ancestors and this one, the first tokens first, without those that hold nothing."""
        before = self.parent.chain() if self.parent is not None else []
        return [*before, self] if self.own else before

    def joined(self) -> Prefix:
        """The same tokens held in one piece."""
        pieces = [link.both for link in self.chain() if link.both is not None]
        return self if len(pieces) < 2 else Prefix(self.length, torch.cat(pieces, dim=3))


EMPTY_PREFIX = Prefix(0)

MERGED = 4
"""A link, but for the first, which may be shared, is held again with what grows after it once it is at most so many
times as long: chains stay short, and a long one is seldom copied."""


@dataclass(frozen=True, eq=False)
class PackedLayout:
    """Where B rows lie among S packed tokens, and what each continues.

    On the host: `lengths` (B,) of the rows' own tokens, their `prefixes` (B,), the different `links` of these, bounds
    on a row's own tokens and on all of its keys, and `before` (B,), how many of the tokens directly before a row it
    sees. On the device: `positions` (S,) int64; `cu_q` and `cu_k` (B + 1,) int32, where rows begin and end among own
    tokens and among keys; `gather` (T,) int64, each key's place among the tokens of `links` followed by the own ones
    (None where each row sees its own tokens alone); and `visible` (B,) int64, where only that many of each row's first
    tokens count (`hiding`). `adapters` (B,) is what each row adds to the projections, None for nothing; it is empty
    where no row adds anything.
    """

    lengths: tuple[int, ...]
    prefixes: tuple[Prefix, ...]
    links: tuple[Prefix, ...]
    causal: bool
    positions: Tensor
    cu_q: Tensor
    cu_k: Tensor
    gather: Tensor | None
    longest: int
    longest_keys: int
    before: tuple[int, ...]
    visible: Tensor | None = None
    adapters: tuple[Adapter | None, ...] = ()

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        device: torch.device | str = "cpu",
        *,
        prefixes: Sequence[Prefix] = (),
        before: Sequence[int] = (),
        positions: Tensor | None = None,
        causal: bool = False,
        adapters: Sequence[Adapter | None] = (),
    ) -> PackedLayout:
        """Rows of `lengths` own tokens, each after its prefix and the tokens `before` it, which follow the same prefix.
        Without `positions` (S,) they count on from there.

        Raises ValueError without a row, with an empty one, and where numbers or positions do not fit.
        """
        prefixes, before = tuple(prefixes) or (EMPTY_PREFIX,) * len(lengths), tuple(before) or (0,) * len(lengths)
        if not lengths or min(lengths) < 1 or not len(prefixes) == len(before) == len(lengths):
            raise ValueError(f"lengths must be positive, and at least one: {list(lengths)}, {len(prefixes)} prefixes")
        sizes, cached = np.array(lengths), np.array([prefix.length for prefix in prefixes]) + np.array(before)
        ends = sizes.cumsum()
        if (causal and any(before)) or any(ends - sizes < before):
            raise ValueError(f"rows of {list(lengths)} tokens cannot see {list(before)} before them")
        if positions is None:
            positions = torch.from_numpy(np.arange(ends[-1]) + (cached - ends + sizes).repeat(sizes))
        elif len(positions) != ends[-1]:
            raise ValueError(f"{len(positions)} positions for rows of {list(lengths)} tokens")

        def edges(ends: IntArray) -> Tensor:
            return upload(torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)), device)

        links = tuple({id(link): link for prefix in prefixes for link in prefix.chain()}.values())
        cu_q = cu_k = edges(ends)
        gather = None
        if links or any(before):
            cu_k = edges((sizes + cached).cumsum())
            gather = upload(torch.from_numpy(_places(lengths, prefixes, before, links)), device)
        return cls(
            tuple(lengths), prefixes, links, causal, upload(positions, device), cu_q, cu_k, gather, max(lengths),
            int((sizes + cached).max()), before, adapters=tuple(adapters) if any(adapters) else (),
        )  # fmt: skip

    @property
    def tokens(self) -> int:
        """S."""
        return len(self.positions)

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """Neighbouring rows with the same adapter: it, and which of the packed tokens are theirs."""
        ends = accumulate(self.lengths)
        rows = zip(self.adapters, self.lengths, ends, strict=False)  # of no adapters, none
        found = []
        for _, group in groupby(rows, key=lambda row: id(row[0])):
            (adapter, length, end), *others = group
            if adapter is not None:
                found.append((adapter, slice(end - length, others[-1][2] if others else end)))
        return tuple(found)

    def hiding(self, visible: Tensor, positions: Tensor) -> PackedLayout:
        """The same causal rows with other positions, of which only the first `visible` (B,) int64 own tokens count, one
        at least. The number stays on the device, so it takes an attention that reads lengths there."""
        return replace(self, visible=visible, positions=positions)

    @cached_property
    def lasts(self) -> Tensor:
        """The packed index of each row's last token that counts, (B,) int64."""
        if self.visible is None:
            return self.cu_q[1:].long() - 1
        return self.cu_q[:-1] + self.visible - 1

    @cached_property
    def index(self) -> tuple[Tensor, Tensor]:
        """0, 1, ... and the row of each token, (S,) int64."""
        index = torch.arange(self.tokens, device=self.cu_q.device)
        return index, torch.searchsorted(self.cu_q[1:].long(), index, right=True)

    @cached_property
    def hidden(self) -> Tensor | None:
        """Which tokens (S,) come after the last one that counts; None where none can."""
        if self.visible is None:
            return None
        index, row = self.index
        return index > self.lasts.index_select(0, row)

    @cached_property
    def own_places(self) -> Tensor:
        """Where among all keys each token's own is, (S,) int64, when no row sees tokens `before` it."""
        index, row = self.index
        return index + (self.cu_k - self.cu_q)[1:].index_select(0, row)

    @cached_property
    def cached_places(self) -> Tensor:
        """`gather` for keys of links alone, (T,) int64: any of them stands for the own ones."""
        assert self.gather is not None  # it is for `laid_out`
        return self.gather.clamp(max=sum(link.own for link in self.links) - 1)

    @cached_property
    def spans(self) -> varlen.Spans:
        """What a variable-length kernel reads for all queries."""
        return varlen.Spans(self.cu_q, self.cu_k, self.longest, self.longest_keys)

    @cached_property
    def last_spans(self) -> varlen.Spans:
        """The same for each row's last token alone. Keys that do not count are a sequence that nobody asks."""
        cu_k = self.cu_k
        if self.visible is not None:
            seen = cu_k[1:] - self.cu_q.diff() + self.visible.to(cu_k.dtype)
            cu_k = functional.pad(torch.stack([seen, cu_k[1:]], dim=1).flatten(), (1, 0))
        cu_q = torch.arange(len(cu_k), dtype=cu_k.dtype, device=cu_k.device)
        if self.visible is not None:
            cu_q = (cu_q + 1) // 2  # 0, 1, 1, 2, 2, ...
        return varlen.Spans(cu_q, cu_k, 1, self.longest_keys)

    @cached_property
    def rows(self) -> attention.Rows:
        """What the C++ pass reads for all queries."""
        return self._rows(self.lengths)

    @cached_property
    def last_rows(self) -> attention.Rows:
        """The same for each row's last token alone."""
        return self._rows((1,) * len(self.lengths))

    def _rows(self, queries: Sequence[int]) -> attention.Rows:
        number = {id(link): index for index, link in enumerate(self.links)}
        pieces = [[number[id(link)] for link in prefix.chain()] for prefix in self.prefixes]
        return attention.Rows(queries, self.lengths, pieces, [link.own for link in self.links], self.before)

    def laid_out(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values (T, Hkv, d) of one layer, each row's in one piece; k and v (S, Hkv, d) are its own."""
        if self.gather is None:
            return k, v
        keys = self._laid_out([link.keys[layer] for link in self.links], k)
        return keys, self._laid_out([link.values[layer] for link in self.links], v)

    def _laid_out(self, cached: Sequence[Tensor], own: Tensor) -> Tensor:
        pieces = [x.transpose(0, 1) for x in cached]
        if self.gather is not None and (not pieces or any(self.before)):  # a token may count in several rows
            return torch.cat([*pieces, own]).index_select(0, self.gather)
        # Written over what was gathered in its places: so the way back is one gather, and no sum.
        every = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return every.index_select(0, self.cached_places).index_copy_(0, self.own_places, own)


def places(lengths: Sequence[int]) -> tuple[int, ...]:
    """Where parts of these lengths begin that lie one after another. For `PackedLayout.of`'s `before`: the parts are
    the blocks of one block-causal sequence."""
    return tuple(accumulate(lengths, initial=0))[:-1]


def grown(
    prefixes: Sequence[Prefix], lengths: Sequence[int], captured: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Prefix, ...]:
    """B prefixes with `lengths` more tokens after them, B new ones; `captured` holds the keys and values (S, Hkv, d) of
    those tokens, one prefix's after another's, in every layer."""
    every = torch.stack([x for pair in captured for x in pair])
    every = every.view(len(captured), 2, *every.shape[1:]).transpose(2, 3)
    results = []
    for prefix, both in zip(prefixes, torch.split(every, list(lengths), dim=3), strict=True):
        pieces, parent, own = [both], prefix, both.shape[3]
        while parent.both is not None and parent.parent is not None and parent.own <= MERGED * own:
            pieces.insert(0, parent.both)
            parent, own = parent.parent, own + parent.own
        # A copy also of one piece alone: a slice would keep every other row alive.
        joined = torch.cat(pieces, dim=3) if len(pieces) > 1 else both.clone(memory_format=torch.contiguous_format)
        results.append(Prefix(prefix.length + both.shape[3], joined, parent if parent.length else None))
    return tuple(results)


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """Some tokens of a forward, by packed indices `places` (n,) int64, whose keys and values (n, Hkv, d) are kept: in
    `captured`, one pair a layer, as the forward passes by."""

    places: Tensor
    captured: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def during(self, attention: Attention) -> Attention:
        """The same attention, which leaves them here."""

        def captures(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.captured.append((k.index_select(0, self.places), v.index_select(0, self.places)))
            return attention(layer, q, k, v)

        return captures


def _places(
    lengths: Sequence[int], prefixes: Sequence[Prefix], before: Sequence[int], links: Sequence[Prefix]
) -> IntArray:
    """`PackedLayout.gather`, (T,), on the host."""
    places, place = {}, 0
    for link in links:
        places[id(link)] = np.arange(place, place + link.own)
        place += link.own
    gather = []
    for prefix, length, seen in zip(prefixes, lengths, before, strict=True):
        gather += [*(places[id(link)] for link in prefix.chain()), np.arange(place - seen, place + length)]
        place += length
    return np.concatenate(gather)


def attend(
    layout: PackedLayout,
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    backend: str = "sdpa",
    *,
    scale: float | None = None,
    last: bool = False,
) -> Tensor:
    """Attention of packed rows: q (S, H, d), or with `last` (B, H, d) of each row's last token alone; k and v
    (S, Hkv, d), the rows' own, with Hkv a divisor of H (query head h reads key head h // (H / Hkv)). Returns q's shape;
    differentiable, but not with respect to prefixes.

    `layer` is which layer's keys of the prefixes count; `scale` None is 1 / sqrt(d); `backend` is what
    `kernels.varlen.choose` gave.
    """
    if backend == "cpp" and attention.runs():
        pieces = [(link.keys[layer], link.values[layer]) for link in layout.links]
        rows = layout.last_rows if last else layout.rows
        return attention.attend(q, k, v, rows, pieces, causal=layout.causal, scale=scale)
    return _over(layout, q, *layout.laid_out(layer, k, v), backend, scale, last)


def _over(
    layout: PackedLayout, q: Tensor, k: Tensor, v: Tensor, backend: str, scale: float | None, last: bool
) -> Tensor:
    """`attend` over keys and values (T, Hkv, d) that are laid out."""
    if backend in ("sdpa", "cpp"):
        if layout.visible is not None:
            raise ValueError("only a variable-length attention reads the rows' lengths from the device")
        keys = [p.length + n + own for p, n, own in zip(layout.prefixes, layout.before, layout.lengths, strict=True)]
        queries = (1,) * len(keys) if last else layout.lengths
        return varlen.by_sequence(q, k, v, queries, keys, layout.causal, scale)
    spans = layout.last_spans if last else layout.spans
    return varlen.attend(backend, q.contiguous(), k, v, spans, causal=layout.causal, scale=scale)


def attend_with_gradient(
    layout: PackedLayout, layer: int, q: Tensor, k: Tensor, v: Tensor, backend: str, *, last: bool = False
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
    """`attend`, and what turns the gradient of its result into those of q, k and v. No autograd around it."""
    if backend == "cpp" and attention.runs():
        pieces = [(link.keys[layer], link.values[layer]) for link in layout.links]
        how = (layout.last_rows if last else layout.rows), pieces, layout.causal, q.shape[2] ** -0.5
        out, log_sums = attention.forward(q, k, v, how)
        return out, lambda g: attention.gradient(g, out, log_sums, q, k, v, how)
    keys, values = layout.laid_out(layer, k, v)  # before autograd begins, so that k and v need not be kept
    with torch.enable_grad():
        a, b, c = leaves = [x.detach().requires_grad_() for x in (q, keys, values)]
        mixed = _over(layout, a, b, c, backend, None, last)

    def back(g: Tensor) -> tuple[Tensor, ...]:
        of_q, *of_keys = torch.autograd.grad(mixed, leaves, g)
        if layout.gather is None:
            return of_q, *of_keys
        return of_q, *(x.index_select(0, layout.own_places) for x in of_keys)

    return mixed.detach(), back

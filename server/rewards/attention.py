"""Causal attention for packed rows that continue cached prefixes, plugged into transformers' models.

transformers' models take their attention from a registry of functions (`AttentionInterface`). Ours runs on one batch
entry that holds all rows one after another, so every other layer of the model works on exactly the tokens there are:
no padding, and nothing of a prefix is computed twice. What the function needs to know of the rows travels as a keyword
argument (`packing`) through the model's forward. It builds no mask for padding and no cache, and transformers builds
none for it.

A token sees its row's prefix and its own row up to itself. Rows with prefixes of like length share one
scaled_dot_product_attention, shorter prefixes padded on the left and masked; where the rows' own lengths differ they
are laid out on a rectangle, inside the attention only. What lies right of a row's end is behind its last token, so
causality hides it and its gradients are exactly zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

from kernels import attention as cpp_attention
from kernels.transfer import upload
from server.errors import ConfigurationError
from server.rewards.cpp_rows import CppRows
from server.rewards.varlen import VarlenRows

IntArray = NDArray[np.int64]

ATTENTION_NAME = "entrgi_packed_causal"


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """Cached keys and values of `length` tokens, a pair (Hkv, own, d) a layer; the keys carry their positions.

    With a `parent`, its tokens come first and are not held again: K answers to one conversation share the parent.
    """

    length: int
    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()
    parent: Prefix | None = None

    def whole(self, layer: int, *, values: bool) -> Tensor:
        """Keys or values (Hkv, length, d) of one layer, the parent's included."""
        own = (self.values if values else self.keys)[layer]
        if self.parent is None:
            return own
        return torch.cat([self.parent.whole(layer, values=values), own], dim=1)


EMPTY_PREFIX = Prefix(0)


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows with prefixes of like length, on a rectangle of `rows` n and `places` m.

    `prefixes` are the different ones among them, padded on the left to `prefix_places` p; `which` (n,) names each row's
    (None when there is one, or one a row). `mask` (m, p + m), or (n, 1, m, p + m) where lengths differ, is True where a
    query sees a key; None for a group without a prefix, which is plainly causal. `last_mask` (n, 1, 1, p + m) is that
    of each row's last token, None where it sees all.
    """

    prefixes: tuple[Prefix, ...]
    prefix_places: int
    which: Tensor | None
    rows: int
    places: int
    mask: Tensor | None
    last_mask: Tensor | None

    def before(self, layer: int, *, values: bool) -> Tensor:
        """Keys or values (n, Hkv, p, d) of one layer in front of every row."""
        stacked = torch.stack(
            [
                functional.pad(x.whole(layer, values=values), (0, 0, self.prefix_places - x.length, 0))
                for x in self.prefixes
            ]
        )
        return stacked.expand(self.rows, -1, -1, -1) if self.which is None else stacked.index_select(0, self.which)


@dataclass(frozen=True, slots=True)
class Packing:
    """How S packed tokens fall into rows and rows into groups, whose rectangles lie one after another (P places).

    `gather` (P,) holds the packed index of every place, a row's last one repeated over the places past its end, and
    `order` (S,) the place of every packed token; both None when places and packed tokens are the same. `lasts` (B,) is
    the packed index of each row's last token, `by_group` (B,) the rows in the groups' order and `by_row` its inverse;
    these two None when the orders are the same. With `varlen` one kernel takes all rows and there are no groups. With
    `capture`, each layer's own keys and values, (Hkv, S, d), are kept
    there.
    """

    groups: tuple[_Group, ...]
    gather: Tensor | None
    order: Tensor | None
    lasts: Tensor
    by_group: Tensor | None
    by_row: Tensor | None
    capture: list[tuple[Tensor, Tensor]] | None = None
    starts: tuple[int, ...] = field(default=())
    varlen: CppRows | VarlenRows | None = None
    hidden: Tensor | None = None  # (S,), of tokens behind their row's last one (`hiding`)
    cached: tuple[int, ...] = ()  # (B,), the length of each row's prefix

    @classmethod
    def of(
        cls,
        prefixes: Sequence[Prefix],
        lengths: Sequence[int],
        device: torch.device,
        *,
        capture: bool = False,
        backend: str = "sdpa",
    ) -> Packing:
        """Packing of B rows of `lengths` own tokens, for a backend that `kernels.varlen.choose` gave. ValueError for
        an empty row or none, or unequal numbers."""
        if len(prefixes) != len(lengths) or not lengths or min(lengths) < 1:
            raise ValueError(f"{len(prefixes)} prefixes for rows of {list(lengths)} tokens")
        cached = tuple(prefix.length for prefix in prefixes)
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        if backend == "cpp" and not cpp_attention.runs():
            backend = "sdpa"
        if backend != "sdpa":
            lasts = upload(torch.tensor(starts[1:]) - 1, device)
            together: CppRows | VarlenRows
            if backend == "cpp":
                together = CppRows.of(prefixes, lengths)
            else:
                together = VarlenRows.of(prefixes, lengths, device, backend)
            kept_keys: list[tuple[Tensor, Tensor]] | None = [] if capture else None
            return cls((), None, None, lasts, None, None, kept_keys, tuple(starts[:-1]), together, cached=cached)
        members: dict[int, list[int]] = {}
        for row, prefix in enumerate(prefixes):
            members.setdefault(id(prefix) if prefix.length else 0, []).append(row)
        first, size = np.array(starts), np.array(lengths)
        groups = []
        gather = []
        grouped: list[int] = []
        order = np.empty(starts[-1], dtype=np.int64)
        offset = 0
        for rows in _alike(prefixes, members):
            place = np.arange(size[rows].max())
            index = (first[rows][:, None] + np.minimum(place, size[rows][:, None] - 1)).ravel()
            real = np.flatnonzero(place < size[rows][:, None])
            gather.append(index)
            order[index[real]] = real + offset
            offset += len(index)
            grouped += rows
            groups.append(_group([prefixes[row] for row in rows], size[rows], device))
        places = np.concatenate(gather)
        same = np.array_equal(places, np.arange(starts[-1]))
        kept = grouped == sorted(grouped)
        return cls(
            tuple(groups),
            None if same else torch.from_numpy(places).to(device),
            None if same else torch.from_numpy(order).to(device),
            torch.from_numpy(first[1:] - 1).to(device),
            None if kept else torch.tensor(grouped, device=device),
            None if kept else torch.from_numpy(np.argsort(grouped)).to(device),
            [] if capture else None,
            tuple(starts[:-1]),
            cached=cached,
        )

    def hiding(self, visible: Tensor) -> Packing:
        """The same rows, of which only the first `visible` (B,) int64 own tokens of each count, one at least; the
        number stays on the device. ValueError for an attention whose rows are laid out on the host."""
        if not isinstance(self.varlen, VarlenRows):
            raise ValueError("only a variable-length attention reads the rows' lengths from the device")
        lasts, hidden = self.varlen.last_and_hidden(visible)
        return replace(self, lasts=lasts, hidden=hidden, varlen=self.varlen.hiding(visible))

    def keep(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Capture each layer's own keys and values, (Hkv, S, d), where they do not pass through transformers."""
        if self.capture is None:
            raise ValueError("this packing does not capture")
        self.capture.extend(pairs)

    def captured(self, row: int, length: int, prefix: Prefix) -> Prefix:
        """`prefix` and, behind it, the `length` tokens of row number `row` that a forward with this packing kept."""
        if self.capture is None:
            raise ValueError("this packing does not capture")
        here = slice(self.starts[row], self.starts[row] + length)
        pieces = [(key[:, here], value[:, here]) for key, value in self.capture]
        parent = prefix if prefix.length and prefix.parent is None else prefix.parent
        if prefix.parent is not None:
            pieces = [
                (torch.cat([old_key, key], dim=1), torch.cat([old_value, value], dim=1))
                for old_key, old_value, (key, value) in zip(prefix.keys, prefix.values, pieces, strict=True)
            ]
        # A slice would keep every other row of the packing alive.
        return Prefix(
            prefix.length + length,
            tuple(key.contiguous() for key, _ in pieces),
            tuple(value.contiguous() for _, value in pieces),
            parent,
        )


def _alike(prefixes: Sequence[Prefix], members: dict[int, list[int]]) -> list[list[int]]:
    """Rows in groups whose prefixes are at most a quarter (and 16 tokens) apart in length: padding costs less there
    than one attention a prefix. Rows without a prefix are a group of their own."""
    groups: list[list[int]] = []
    shortest = -1
    for rows in sorted(members.values(), key=lambda rows: prefixes[rows[0]].length):
        length = prefixes[rows[0]].length
        if shortest < 1 or length > 1.25 * shortest + 16:
            groups.append([])
            shortest = length
        groups[-1] += rows
    return [sorted(rows) for rows in groups]


def _group(prefixes: Sequence[Prefix], sizes: IntArray, device: torch.device) -> _Group:
    """The group of rows that continue `prefixes` (one a row) with `sizes` (n,) tokens each."""
    different = list({id(prefix): prefix for prefix in prefixes}.values())
    longest, places = max(prefix.length for prefix in different), int(sizes.max())
    padding = np.array([longest - prefix.length for prefix in prefixes])
    which = mask = last_mask = None
    if 1 < len(different) < len(prefixes):
        number = {id(prefix): index for index, prefix in enumerate(different)}
        which = torch.tensor([number[id(prefix)] for prefix in prefixes], device=device)
    key = np.arange(longest + places)
    real = key >= padding[:, None]
    if longest:
        mask = torch.ones(places, longest + places, dtype=torch.bool, device=device).tril(longest)
        if padding.any():
            mask = mask & torch.from_numpy(real).to(device)[:, None, None, :]
    seen = real & (key < longest + sizes[:, None])
    if not seen.all():
        last_mask = torch.from_numpy(seen).to(device)[:, None, None, :]
    return _Group(tuple(different), longest, which, len(prefixes), places, mask, last_mask)


def _keys_and_values(group: _Group, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Those of one group's rows, (n, Hkv, p + m, d): its own, (n * m, Hkv, d), behind the prefixes'."""
    k, v = (x.view(group.rows, group.places, *x.shape[1:]).transpose(1, 2) for x in (key, value))
    if group.prefix_places:
        k = torch.cat([group.before(layer, values=False), k], dim=2)
        v = torch.cat([group.before(layer, values=True), v], dim=2)
    return k, v


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool, scale: float | None) -> Tensor:
    """scaled_dot_product_attention of (n, H, m, d) with keys of H or fewer heads."""
    shared = q.shape[1] != k.shape[1]
    if shared and mask is not None and q.device.type == "cuda":
        # The fused kernels that take a mask do not know grouped queries; without this, CUDA falls back to plain maths.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        shared = False
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=shared
    )


def _attend(group: _Group, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Attention of one group on its rectangle: query (n * m, H, d), key and value (n * m, Hkv, d) -> (n * m, H, d)."""
    q = query.view(group.rows, group.places, *query.shape[1:]).transpose(1, 2)
    k, v = _keys_and_values(group, layer, key, value)
    out = _sdpa(q, k, v, group.mask, causal=group.mask is None, scale=scale)
    return out.transpose(1, 2).flatten(0, 1)


def _attend_last(group: _Group, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """The same for one query a row, its last token's: query (n, H, d) -> (n, H, d)."""
    k, v = _keys_and_values(group, layer, key, value)
    return _sdpa(query[:, :, None], k, v, group.last_mask, causal=False, scale=scale)[:, :, 0]


def attend(
    packing: Packing, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None
) -> Tensor:
    """Causal attention of packed rows behind their prefixes, (S, H, d): query (S, H, d), key and value (S, Hkv, d)."""
    if packing.varlen is not None:
        return packing.varlen.attend(layer, query, key, value, scale, last=False)
    q, k, v = query, key, value
    if packing.gather is not None:
        q, k, v = (x.index_select(0, packing.gather) for x in (q, k, v))
    outputs = [_attend(*parts, scale) for parts in _by_group(packing, layer, q, k, v)]
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return out if packing.order is None else out.index_select(0, packing.order)


def attend_last(
    packing: Packing, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None
) -> Tensor:
    """The same for each row's last token alone: query (B, H, d), key and value (S, Hkv, d) -> (B, H, d)."""
    if packing.varlen is not None:
        return packing.varlen.attend(layer, query, key, value, scale, last=True)
    k, v = key, value
    if packing.gather is not None:
        k, v = (x.index_select(0, packing.gather) for x in (k, v))
    q = query if packing.by_group is None else query.index_select(0, packing.by_group)
    outputs = [_attend_last(*parts, scale) for parts in _by_group(packing, layer, q, k, v)]
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return out if packing.by_row is None else out.index_select(0, packing.by_row)


def _by_group(
    packing: Packing, layer: int, query: Tensor, key: Tensor, value: Tensor
) -> list[tuple[_Group, int, Tensor, Tensor, Tensor]]:
    """What each group's attention takes; `query` has a row for every place, or for every row."""
    # split, not slices: the gradient of a split is one concatenation, that of n slices n full-size sums.
    sizes = [group.rows * group.places for group in packing.groups]
    each = sizes if len(query) == sum(sizes) else [group.rows for group in packing.groups]
    queries, keys, values = torch.split(query, each), torch.split(key, sizes), torch.split(value, sizes)
    return [(group, layer, queries[index], keys[index], values[index]) for index, group in enumerate(packing.groups)]


def packed_causal_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    packing: Packing | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query (1, H, S, d), key and value (1, Hkv, S, d) -> (1, S, H, d).

    ConfigurationError for a kind of attention that it does not compute (a window, soft-capped scores, sinks, dropout).
    """
    if packing is None or attention_mask is not None:
        raise ValueError("reward models run through RewardModel, which says how their rows are packed")
    for option in ("sliding_window", "softcap", "s_aux", "position_bias", "dropout"):
        setting = options.get(option)
        if setting is not None and not (isinstance(setting, int | float) and setting == 0):
            raise ConfigurationError(f"reward model: attention with {option} is not supported")
    if not getattr(module, "is_causal", True):
        raise ConfigurationError("reward model: its attention is not causal")
    layer = module.layer_idx
    if not isinstance(layer, int):
        raise ConfigurationError("reward model: its attention layers carry no layer_idx")
    if packing.capture is not None:
        packing.capture.append((key[0].detach(), value[0].detach()))
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (S, heads, d)
    return attend(packing, layer, q, k, v, scaling)[None], None


def register() -> None:
    """Make the function known to transformers under `ATTENTION_NAME`; registering again changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, packed_causal_attention)

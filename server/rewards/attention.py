"""Causal attention for packed rows that continue cached prefixes, plugged into transformers' models.

transformers' models take their attention from a registry of functions (`AttentionInterface`). Ours runs on one batch
entry that holds all rows one after another, so every other layer of the model works on exactly the tokens there are:
no padding, and nothing of a prefix is computed twice. What the function needs to know of the rows travels as a keyword
argument (`packing`) through the model's forward. It builds no mask for padding and no cache, and transformers builds
none for it.

A token sees its row's prefix and its own row up to itself. Rows that continue the same prefix share one
scaled_dot_product_attention; where their lengths differ they are laid out on a rectangle, inside the attention only.
What lies right of a row's end is behind its last token, so causality hides it and its gradients are exactly zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

from server.errors import ConfigurationError

ATTENTION_NAME = "entrgi_packed_causal"


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """Cached keys and values of `length` tokens, a pair (Hkv, length, d) a layer; the keys carry their positions."""

    length: int
    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()


EMPTY_PREFIX = Prefix(0)


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows that continue the same prefix, on a rectangle of `rows` n and `places` m.

    `mask` (m, prefix + m) is True where a query sees a key; None for a group without a prefix, which is plainly causal.
    """

    prefix: Prefix
    rows: int
    places: int
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class Packing:
    """How S packed tokens fall into rows and rows into groups, whose rectangles lie one after another (P places).

    `gather` (P,) holds the packed index of every place, a row's last one repeated over the places past its end, and
    `order` (S,) the place of every packed token; both None when places and packed tokens are the same. With `capture`,
    each layer's own keys and values, (Hkv, S, d), are kept there.
    """

    groups: tuple[_Group, ...]
    gather: Tensor | None
    order: Tensor | None
    capture: list[tuple[Tensor, Tensor]] | None = None
    starts: tuple[int, ...] = field(default=())

    @classmethod
    def of(
        cls,
        prefixes: Sequence[Prefix],
        lengths: Sequence[int],
        device: torch.device,
        *,
        capture: bool = False,
    ) -> Packing:
        """Packing of B rows of `lengths` own tokens. ValueError for an empty row or none, or unequal numbers."""
        if len(prefixes) != len(lengths) or not lengths or min(lengths) < 1:
            raise ValueError(f"{len(prefixes)} prefixes for rows of {list(lengths)} tokens")
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        members: dict[int, list[int]] = {}
        for row, prefix in enumerate(prefixes):
            members.setdefault(id(prefix) if prefix.length else 0, []).append(row)
        first, size = np.array(starts), np.array(lengths)
        groups = []
        gather = []
        order = np.empty(starts[-1], dtype=np.int64)
        masks: dict[tuple[int, int], Tensor] = {}
        offset = 0
        for rows in members.values():
            place = np.arange(size[rows].max())
            index = (first[rows][:, None] + np.minimum(place, size[rows][:, None] - 1)).ravel()
            real = np.flatnonzero(place < size[rows][:, None])
            gather.append(index)
            order[index[real]] = real + offset
            offset += len(index)
            prefix = prefixes[rows[0]]
            mask = None
            if prefix.length:
                shape = (len(place), prefix.length + len(place))
                if shape not in masks:
                    masks[shape] = torch.ones(shape, dtype=torch.bool, device=device).tril(prefix.length)
                mask = masks[shape]
            groups.append(_Group(prefix, len(rows), len(place), mask))
        places = np.concatenate(gather)
        same = np.array_equal(places, np.arange(starts[-1]))
        return cls(
            tuple(groups),
            None if same else torch.from_numpy(places).to(device),
            None if same else torch.from_numpy(order).to(device),
            [] if capture else None,
            tuple(starts[:-1]),
        )

    def captured(self, row: int, length: int, prefix: Prefix) -> Prefix:
        """`prefix` and, behind it, the `length` tokens of row number `row` that a forward with this packing kept."""
        if self.capture is None:
            raise ValueError("this packing does not capture")
        here = slice(self.starts[row], self.starts[row] + length)
        pieces = [(key[:, here], value[:, here]) for key, value in self.capture]
        if prefix.length:
            pieces = [
                (torch.cat([old_key, key], dim=1), torch.cat([old_value, value], dim=1))
                for old_key, old_value, (key, value) in zip(prefix.keys, prefix.values, pieces, strict=True)
            ]
        # A slice would keep every other row of the packing alive.
        return Prefix(
            prefix.length + length,
            tuple(key.contiguous() for key, _ in pieces),
            tuple(value.contiguous() for _, value in pieces),
        )


def _attend(group: _Group, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Attention of one group on its rectangle: query (n * m, H, d), key and value (n * m, Hkv, d) -> (n * m, H, d)."""
    n, m = group.rows, group.places
    q, k, v = (x.view(n, m, *x.shape[1:]).transpose(1, 2) for x in (query, key, value))  # (n, heads, m, d)
    if group.prefix.length:
        k = torch.cat([group.prefix.keys[layer].expand(n, -1, -1, -1), k], dim=2)
        v = torch.cat([group.prefix.values[layer].expand(n, -1, -1, -1), v], dim=2)
    shared = q.shape[1] != k.shape[1]
    if shared and group.mask is not None and q.device.type == "cuda":
        # The fused kernels that take a mask do not know grouped queries; without this, CUDA falls back to plain maths.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        shared = False
    out = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=group.mask, is_causal=group.mask is None, scale=scale, enable_gqa=shared
    )
    return out.transpose(1, 2).flatten(0, 1)


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
    if packing.gather is not None:
        q, k, v = (x.index_select(0, packing.gather) for x in (q, k, v))
    # split, not slices: the gradient of a split is one concatenation, that of n slices n full-size sums.
    sizes = [group.rows * group.places for group in packing.groups]
    queries, keys, values = (torch.split(x, sizes) for x in (q, k, v))
    outputs = [
        _attend(group, layer, queries[index], keys[index], values[index], scaling)
        for index, group in enumerate(packing.groups)
    ]
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if packing.order is not None:
        out = out.index_select(0, packing.order)
    return out[None], None


def register() -> None:
    """Make the function known to transformers under `ATTENTION_NAME`; registering again changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, packed_causal_attention)

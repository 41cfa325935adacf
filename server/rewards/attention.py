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
    """Rows that continue the same prefix, on a rectangle of n rows and m places.

    `gather` (n * m,) holds packed indices, a row's last one repeated over the places past its end; None when the rows
    are neighbours of equal length from `start` on. `mask` (m, prefix + m) is True where a query sees a key; None for a
    group without a prefix, which is plainly causal.
    """

    prefix: Prefix
    rows: int
    places: int
    start: int
    gather: Tensor | None
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class Packing:
    """How S packed tokens fall into rows, and by which `order` (S,) the groups' outputs are put back (None: as is).

    With `capture`, each layer's own keys and values, (Hkv, S, d), are kept there.
    """

    groups: tuple[_Group, ...]
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
        groups = []
        packed: list[Tensor] = []  # of each output token of the groups, its packed index
        where: list[Tensor] = []  # its place among the groups' outputs
        offset = 0
        for rows in members.values():
            group, real, places = _group(prefixes[rows[0]], rows, starts, lengths, device)
            groups.append(group)
            packed.append(real)
            where.append(places + offset)
            offset += group.rows * group.places
        order = torch.empty(starts[-1], dtype=torch.int64)
        order[torch.cat(packed)] = torch.cat(where)
        in_place = offset == len(order) and bool((order[1:] > order[:-1]).all())
        return cls(tuple(groups), None if in_place else order.to(device), [] if capture else None, tuple(starts[:-1]))

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


def _group(
    prefix: Prefix, rows: Sequence[int], starts: Sequence[int], lengths: Sequence[int], device: torch.device
) -> tuple[_Group, Tensor, Tensor]:
    """The group of `rows`; of its real tokens the packed indices and the places on the rectangle, both on the CPU."""
    sizes = torch.tensor([lengths[row] for row in rows])
    firsts = torch.tensor([starts[row] for row in rows])
    longest = int(sizes.max())
    place = torch.arange(longest)
    index = firsts[:, None] + torch.minimum(place, sizes[:, None] - 1)
    real = place < sizes[:, None]
    neighbours = list(rows) == list(range(rows[0], rows[0] + len(rows)))
    gather = None if neighbours and bool(real.all()) else index.flatten().to(device)
    mask = None
    if prefix.length:
        mask = torch.ones(longest, prefix.length + longest, dtype=torch.bool, device=device).tril(prefix.length)
    group = _Group(prefix, len(rows), longest, starts[rows[0]], gather, mask)
    return group, index[real], torch.nonzero(real.flatten())[:, 0]


def _attend(group: _Group, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Attention of one group: query (S, H, d), key and value (S, Hkv, d) packed -> (n * m, H, d)."""
    n, m = group.rows, group.places
    if group.gather is None:
        here = slice(group.start, group.start + n * m)
        q, k, v = query[here], key[here], value[here]
    else:
        q, k, v = (x.index_select(0, group.gather) for x in (query, key, value))
    q, k, v = (x.view(n, m, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))  # (n, heads, m, d)
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
    outputs = [_attend(group, layer, q, k, v, scaling) for group in packing.groups]
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if packing.order is not None:
        out = out.index_select(0, packing.order)
    return out[None], None


def register() -> None:
    """Make the function known to transformers under `ATTENTION_NAME`; registering again changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, packed_causal_attention)

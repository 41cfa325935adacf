"""Packed causal attention for the models that transformers runs.

transformers' models take their attention from a registry of functions (`AttentionInterface`). Ours runs on one batch
entry that holds all rows one after another, so every other layer of the model works on exactly the tokens there are.
What the function needs to know of the rows travels as a keyword argument (`packed`) through the model's forward. It
builds no mask for padding and no cache, and transformers builds none for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from server.errors import ConfigurationError
from server.models.packing import PackedLayout, attend

ATTENTION_NAME = "entrgi_packed_causal"


@dataclass(frozen=True, slots=True)
class Packed:
    """What a forward's attentions read, and the keys and values (S, Hkv, d) that each layer leaves here."""

    layout: PackedLayout
    backend: str
    captured: list[tuple[Tensor, Tensor]] = field(default_factory=list)


def packed_causal_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    packed: Packed | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query (1, H, S, d), key and value (1, Hkv, S, d) -> (1, S, H, d).

    ConfigurationError for a kind of attention that it does not compute (a window, soft-capped scores, sinks, dropout).
    """
    if packed is None or attention_mask is not None:
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
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (S, heads, d)
    packed.captured.append((k.detach(), v.detach()))
    return attend(packed.layout, layer, q, k, v, packed.backend, scale=scaling)[None], None


AttentionInterface.register(ATTENTION_NAME, packed_causal_attention)

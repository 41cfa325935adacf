"""A reward model's network on packed rows: final states of last tokens, and keys and values of prefixes.

Guidance runs this M times a denoising step, forward and back to the inputs, so it is worth doing no more than is
needed. R reads one token a row: in the last layer only that token has a query, an output projection and an MLP; and
where only keys and values are wanted (a prefix) the last layer ends with them. `Trunk` does so with our own layers
(`models.layers`) on the weights that transformers loaded, for Llama's family of blocks: Llama, Mistral, Qwen2 and
Qwen3. Every other architecture runs as transformers has it (`Wrapped`): the same rewards, a little slower.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from server.models.layers import Decoder, DecoderConfig, Variant, compute_dtype
from server.models.packing import PackedLayout, attend
from server.rewards.attention import Packed
from server.types import DecoderShape

FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")
"""Ways to scale rotations that depend on nothing but the position."""

KNOWN = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")


def shape_of(config: Any) -> DecoderShape:
    """Sizes in a transformers configuration. Where it names none: keys for every head, an MLP of 4 times the width."""
    width, heads = config.hidden_size, config.num_attention_heads
    return DecoderShape(
        hidden=width,
        intermediate=getattr(config, "intermediate_size", None) or 4 * width,
        heads=heads,
        key_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or width // heads,
        layers=config.num_hidden_layers,
    )


class Trunk:
    """Our layers over a transformers base model's weights, differentiable with respect to the embeddings alone.

    Projections that read the same input are stacked, and the module's own weights become views of them: no second copy.
    Rotations are the model's own, which knows every kind of scaled positions: a table of all positions, but for kinds
    that depend on how long a sequence is, and for rows longer than the model was made for.
    """

    written_out = True

    def __init__(self, base: Any) -> None:
        config, attention = base.config, base.layers[0].self_attn
        with torch.device("meta"):
            self._decoder = Decoder(
                DecoderConfig(
                    **asdict(shape_of(config)),
                    vocab_size=len(base.embed_tokens.weight),
                    rms_norm_eps=config.rms_norm_eps,
                ),
                Variant(
                    qkv_bias=attention.q_proj.bias is not None,
                    out_bias=attention.o_proj.bias is not None,
                    head_norms=hasattr(attention, "q_norm"),
                ),
            )
        self._decoder.load_state_dict(base.state_dict(), strict=True, assign=True)
        self._decoder.freeze(stack=True)
        self._rotary, self._table = base.rotary_emb, None
        weight = self._decoder.norm.weight
        if base.rotary_emb.rope_type in FIXED_ROTATIONS:
            every = torch.arange(config.max_position_embeddings, device=weight.device)
            self._table = self._angles(every, self._decoder.embed_tokens.activation_dtype)

    def last_states(self, layout: PackedLayout, embeds: Tensor, backend: str) -> Tensor:
        """Final-norm states (B, d) of each row's last token; embeds (S, d)."""
        return self._decoder.last_states(embeds, *self._rotations(layout, embeds), layout, backend)

    def last_states_and_gradient(
        self, layout: PackedLayout, embeds: Tensor, backend: str
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]] | None:
        """The same, and what turns their gradient (B, d) into that of the embeddings (S, d); None where it takes
        autograd."""
        frozen = self._decoder.frozen
        if frozen is None or not frozen.takes(embeds):
            return None
        return frozen.last_states_and_gradient(embeds, *self._rotations(layout, embeds), layout, backend)

    def keys_and_values(self, layout: PackedLayout, embeds: Tensor, backend: str) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (S, Hkv, size) of every layer; embeds (S, d)."""
        attention = partial(attend, layout, backend=backend)
        return self._decoder.keys_and_values(embeds, *self._rotations(layout, embeds), attention)

    def _rotations(self, layout: PackedLayout, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (S, size / 2) of a layout's positions."""
        if self._table is None or layout.longest_keys > len(self._table[0]):
            return self._angles(layout.positions, embeds.dtype)
        cos, sin = self._table
        return cos.index_select(0, layout.positions), sin.index_select(0, layout.positions)

    def _angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        like = torch.empty(0, dtype=compute_dtype(dtype), device=positions.device)
        cos, sin = (table[0].chunk(2, dim=-1)[0].contiguous() for table in self._rotary(like, positions[None]))
        return cos, sin


class Wrapped:
    """The same of a base model that transformers runs."""

    written_out = False

    def __init__(self, base: Any) -> None:
        self._base = base

    def last_states(self, layout: PackedLayout, embeds: Tensor, backend: str) -> Tensor:
        """Final-norm states (B, d) of each row's last token; embeds (S, d)."""
        return self._run(Packed(layout, backend), embeds).index_select(0, layout.lasts)

    def last_states_and_gradient(self, layout: PackedLayout, embeds: Tensor, backend: str) -> None:
        """It takes autograd."""

    def keys_and_values(self, layout: PackedLayout, embeds: Tensor, backend: str) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (S, Hkv, size) of every layer; embeds (S, d)."""
        packed = Packed(layout, backend)
        self._run(packed, embeds)
        return packed.captured

    def _run(self, packed: Packed, embeds: Tensor) -> Tensor:
        states: Tensor = self._base(
            inputs_embeds=embeds[None],
            attention_mask=None,
            position_ids=packed.layout.positions[None],
            use_cache=False,
            packed=packed,
        ).last_hidden_state
        return states[0]


def trunk_of(base: Any) -> Trunk | Wrapped:
    """The way in which a transformers base model runs here."""
    if type(base).__name__ not in KNOWN or base.config.hidden_act != "silu":
        return Wrapped(base)
    projections = [getattr(layer.mlp, name) for layer in base.layers for name in ("gate_proj", "up_proj", "down_proj")]
    return Wrapped(base) if any(projection.bias is not None for projection in projections) else Trunk(base)

"""The decoder of a reward model, written out for packed rows: the same weights as transformers' module, less work.

Guidance runs this M times a denoising step, forward and back to the inputs, so it is worth being exact about what is
needed. R reads one token a row: in the last layer only that token has a query, an output projection and an MLP; and
where only keys and values are wanted (a prefix) the last layer ends with them. Projections that read the same input
are one product. What lies between the products is `kernels.blocks` where that runs and the model's own modules (with
their rounding) elsewhere; attention is `rewards.attention`.

Llama's family of blocks (Llama, Mistral, Qwen2, Qwen3) is known here. Every other architecture runs as transformers
has it, and is the same reward a little slower.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kernels import blocks
from kernels.linear import linear
from server.rewards.attention import Packing, attend, attend_last

KNOWN = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")


@dataclass(frozen=True, slots=True)
class _Layer:
    """One block's weights: q, k, v stacked (and their bias, if any), gate and up stacked."""

    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    gate_up: Tensor
    down: Tensor
    attention_norm: Any  # a norm module
    mlp_norm: Any
    query_norm: Any  # or None
    key_norm: Any  # or None


class Trunk:
    """Final-norm hidden states of packed rows, differentiable with respect to the embeddings alone."""

    def __init__(self, base: Any) -> None:
        config = base.config
        self.heads: int = config.num_attention_heads
        self.key_heads: int = config.num_key_value_heads
        self.size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.epsilon: float = config.rms_norm_eps
        self._final_norm: Any = base.norm
        self._rotary = base.rotary_emb
        self._layers = [_layer(layer) for layer in base.layers]

    @classmethod
    def of(cls, base: Any) -> Trunk | None:
        """The trunk of a transformers base model, or None where its blocks are not of a known kind.

        The stacked projections replace the module's own weights, which become views of them: no second copy.
        """
        if type(base).__name__ not in KNOWN or base.config.hidden_act != "silu":
            return None
        if any(getattr(layer.mlp, name).bias is not None for layer in base.layers for name in _MLP):
            return None
        return cls(base)

    def last_hidden(self, packing: Packing, positions: Tensor, embeds: Tensor) -> Tensor:
        """Final-norm states (B, d) of each row's last token; embeds (S, d) at absolute positions (S,)."""
        x, rotation = embeds, self._rotation(embeds, positions)
        for index, layer in enumerate(self._layers[:-1]):
            q, k, v = self._heads(layer, self._normalise(layer.attention_norm, x), rotation)
            x = self._close(layer, x, attend(packing, index, q, k, v, self.size**-0.5))
        if packing.hidden is not None:  # whatever a kernel leaves in the gradients of keys that nobody asked
            x = torch.where(packing.hidden[:, None], x.detach(), x)
        layer, index = self._layers[-1], len(self._layers) - 1
        normed, (cosines, sines) = self._normalise(layer.attention_norm, x), rotation
        lasts, width = packing.lasts, self.heads * self.size
        last_rotation = cosines.index_select(0, lasts), sines.index_select(0, lasts)
        q, _, _ = self._split(layer, normed.index_select(0, lasts), slice(0, width), last_rotation)
        _, k, v = self._split(layer, normed, slice(width, None), rotation)
        x = self._close(layer, x.index_select(0, lasts), attend_last(packing, index, q, k, v, self.size**-0.5))
        return self._normalise(self._final_norm, x)

    def keys_and_values(self, packing: Packing, positions: Tensor, embeds: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Rotated keys and values, (S, Hkv, size) a layer, of the rows' own tokens."""
        captured = []
        x, rotation = embeds, self._rotation(embeds, positions)
        for index, layer in enumerate(self._layers):
            q, k, v = self._heads(layer, self._normalise(layer.attention_norm, x), rotation)
            captured.append((k, v))
            if index < len(self._layers) - 1:
                x = self._close(layer, x, attend(packing, index, q, k, v, self.size**-0.5))
        return captured

    # -- a block ------------------------------------------------------------------------------------------------------

    def _rotation(self, embeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (S, size / 2) as the model's own rotary module has them."""
        cosines, sines = self._rotary(embeds[None], positions[None].to(embeds.device))
        half = self.size // 2
        return cosines[0, :, :half], sines[0, :, :half]

    def _normalise(self, norm: Any, x: Tensor) -> Tensor:
        if blocks.runs(x):
            return blocks.rms_norm(x, norm.weight.to(x.dtype), self.epsilon)
        out: Tensor = norm(x)
        return out

    def _heads(self, layer: _Layer, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """q (S, H, size), k and v (S, Hkv, size); q and k normalised where the family does, and rotated."""
        return self._split(layer, x, slice(None), rotation)

    def _split(
        self, layer: _Layer, x: Tensor, part: slice, rotation: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same of a part of the stacked projections: all, q alone, or k and v alone."""
        bias = None if layer.qkv_bias is None else layer.qkv_bias[part]
        heads = 0 if part.start else self.heads
        key_heads = 0 if part.stop else self.key_heads
        projected = linear(x, layer.qkv[part], bias)
        norms = layer.query_norm, layer.key_norm
        if blocks.runs(projected) and self.size <= blocks.MAX_HEAD_SIZE:
            of_q, of_k = (None if norm is None else norm.weight.to(x.dtype) for norm in norms)
            return blocks.split_heads(projected, heads, key_heads, of_q, of_k, self.epsilon, *rotation)
        sizes = [count * self.size for count in (heads, key_heads, key_heads)]
        q, k, v = (piece.view(len(x), -1, self.size) for piece in torch.split(projected, sizes, dim=1))
        q, k = (piece if norm is None else norm(piece) for piece, norm in zip((q, k), norms, strict=True))
        return _rotate(q, *rotation), _rotate(k, *rotation), v

    def _close(self, layer: _Layer, x: Tensor, mixed: Tensor) -> Tensor:
        """The block behind its attention: output projection, then the MLP, each added to the stream."""
        x = x + linear(mixed.flatten(1), layer.out, layer.out_bias)
        wide = linear(self._normalise(layer.mlp_norm, x), layer.gate_up)
        if blocks.runs(wide):
            inner = blocks.swiglu(wide)
        else:
            gate, up = wide.chunk(2, dim=-1)
            inner = functional.silu(gate) * up
        return x + linear(inner, layer.down)


def _rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """x (S, H, size), channel i with channel i + size / 2."""
    first, second = x.chunk(2, dim=-1)
    cosines, sines = cosines[:, None], sines[:, None]
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)


_MLP = ("gate_proj", "up_proj", "down_proj")


def _layer(block: Any) -> _Layer:
    attention, mlp = block.self_attn, block.mlp
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    biases = [projection.bias for projection in projections]
    return _Layer(
        qkv=_stack(projections),
        qkv_bias=None if biases[0] is None else torch.cat([bias.detach() for bias in biases]),
        out=attention.o_proj.weight,
        out_bias=attention.o_proj.bias,
        gate_up=_stack([mlp.gate_proj, mlp.up_proj]),
        down=mlp.down_proj.weight,
        attention_norm=block.input_layernorm,
        mlp_norm=block.post_attention_layernorm,
        query_norm=getattr(attention, "q_norm", None),
        key_norm=getattr(attention, "k_norm", None),
    )


def _stack(projections: list[Any]) -> Tensor:
    """Their weights as one matrix, of which they become views."""
    stacked = torch.cat([projection.weight.detach() for projection in projections])
    start = 0
    for projection in projections:
        rows = projection.weight.shape[0]
        projection.weight.data = stacked[start : start + rows]
        start += rows
    return stacked

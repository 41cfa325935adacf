"""Dream (Dream-v0, Dream-Coder, DiffuCoder): Qwen2 blocks, bidirectional, with shifted logits.

Parameter names are those of the published checkpoints. A block is the usual pre-norm pair: attention with biased
q, k, v projections, rotary positions and grouped key heads, then SwiGLU. Shapes are packed: S tokens, width d.
Dream was made from an autoregressive model, hence the shift: the output at i - 1 predicts position i.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kernels.linear import linear
from server.models.base import Backbone, Trunk, source_rows
from server.models.config import ConfigReader
from server.models.layers import Embedding, Linear, RMSNorm, RotaryTable, initialise, rotate, swiglu
from server.models.packing import Attention, PackedLayout, attend
from server.types import DecoderShape


@dataclass(frozen=True, slots=True)
class DreamConfig:
    """The published config.json, as far as the network depends on it."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    mask_token_id: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> DreamConfig:
        """From a parsed config.json. Raises ConfigurationError for what is missing, wrong or not implemented."""
        read = ConfigReader(raw)
        read.require("hidden_act", "silu")
        read.require("rope_scaling")
        read.require("quantization_config")
        read.require("use_sliding_window", False)
        read.require_all("layer_types", "full_attention")
        read.require("attention_dropout", 0, 0.0)
        heads = read.integer("num_attention_heads")
        config = cls(
            vocab_size=read.integer("vocab_size"),
            hidden_size=read.integer("hidden_size"),
            intermediate_size=read.integer("intermediate_size"),
            num_hidden_layers=read.integer("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=read.integer("num_key_value_heads", heads),
            mask_token_id=read.integer("mask_token_id", minimum=0),
            max_position_embeddings=read.integer("max_position_embeddings"),
            rms_norm_eps=read.number("rms_norm_eps", 1e-6),
            rope_theta=read.rope_theta(10000.0),
            initializer_range=read.number("initializer_range", 0.02),
            tie_word_embeddings=read.flag("tie_word_embeddings", False),
        )
        read.divides("hidden_size", config.hidden_size, "2 * num_attention_heads", 2 * heads)
        read.divides("num_attention_heads", heads, "num_key_value_heads", config.num_key_value_heads)
        read.require("head_dim", config.head_dim)
        return config


class DreamAttention(nn.Module):
    """Grouped-query attention over whole sequences."""

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width = config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, width)
        self.k_proj = Linear(config.hidden_size, key_width)
        self.v_proj = Linear(config.hidden_size, key_width)
        self.o_proj = Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention) -> Tensor:
        """(S, d) -> (S, H * head_dim): every head's output, before `o_proj`."""
        heads = (-1, self.head_dim)
        q = rotate(self.q_proj(x).unflatten(-1, heads), cos, sin)
        k = rotate(self.k_proj(x).unflatten(-1, heads), cos, sin)
        return attention(q, k, self.v_proj(x).unflatten(-1, heads)).flatten(1)


class DreamMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, d) -> (N, d)."""
        out: Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        return out


class DreamBlock(nn.Module):
    """Attention, then SwiGLU, each behind its norm and added to the stream."""

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        self.self_attn = DreamAttention(config)
        self.mlp = DreamMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention, rows: Tensor | None) -> Tensor:
        """(S, d) -> (S, d), or (N, d) where only `rows` (N,) are read afterwards."""
        mixed = self.self_attn(self.input_layernorm(x), cos, sin, attention)
        if rows is not None:
            x, mixed = x[rows], mixed[rows]
        x = x + self.self_attn.o_proj(mixed)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class DreamBackbone(nn.Module):
    """Embeddings, blocks, final norm: what the checkpoint calls `model`."""

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DreamBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryTable(config.head_dim, config.rope_theta)
        self.attention_backend = "sdpa"

    @property
    def activation_dtype(self) -> torch.dtype:
        """What states are in."""
        return self.embed_tokens.activation_dtype

    def forward(self, tokens: Tensor, layout: PackedLayout, rows: Tensor | None) -> Tensor:
        """tokens (S,) -> final-norm states (S, d) or, at `rows`, (N, d)."""
        cos, sin = self.rotary.rows(layout.positions, layout.max_length, self.activation_dtype)
        return self.states(tokens, cos, sin, partial(attend, layout=layout, backend=self.attention_backend), rows)

    def states(self, tokens: Tensor, cos: Tensor, sin: Tensor, attention: Attention, rows: Tensor | None) -> Tensor:
        """The same from rotations (S, 1, head_dim / 2) and attention: a function of tensors alone."""
        x: Tensor = self.embed_tokens(tokens)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            # Behind the last attention nothing mixes positions: the rest is computed only where it is read.
            x = layer(x, cos, sin, attention, rows if index == last else None)
        out: Tensor = self.norm(x)
        return out


class DreamModel(nn.Module):
    """The Dream family (see `base.DiffusionModel`). Tied embeddings are one parameter, `model.embed_tokens.weight`."""

    family = "dream"
    shifts = True

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.mask_token_id = config.mask_token_id
        self.context_length = config.max_position_embeddings
        # Some checkpoints with tied embeddings store them twice.
        self.ignored_weights = ("lm_head.weight",) if config.tie_word_embeddings else ()
        self.model = DreamBackbone(config)
        self.trunk: Trunk = self.model.forward
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def backbone(self) -> Backbone:
        """Embeddings, blocks and final norm, for `models.acceleration`, which may put something faster in the place of
        its `forward`, `trunk`."""
        return self.model

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return self.model.embed_tokens.weight.dtype

    @property
    def activation_dtype(self) -> torch.dtype:
        """What hidden states and logits are in: the weights' dtype, or float32 where the device has no instructions
        for a narrower one."""
        return self.model.activation_dtype

    @property
    def shape(self) -> DecoderShape:
        """Sizes of the blocks."""
        config = self.config
        return DecoderShape(
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.num_hidden_layers,
        )

    def hidden(self, tokens: Tensor, layout: PackedLayout, rows: Tensor | None = None) -> Tensor:
        """Final-norm hidden states (S, d) of tokens (S,) int64; with `rows` (N,) only those packed indices (N, d)."""
        return self.trunk(tokens, layout, rows)

    def head(self, hidden: Tensor) -> Tensor:
        """(N, d) -> logits (N, V), unshifted."""
        tied = self.config.tie_word_embeddings
        return linear(hidden, self.model.embed_tokens.weight if tied else self.lm_head.weight)

    def masked_hidden(self, tokens: Tensor, layout: PackedLayout, rows: Tensor) -> Tensor:
        """`masked_logits` before the head, (N, d); the shift is done here."""
        return self.hidden(tokens, layout, source_rows(layout, rows, shifts=self.shifts))

    def masked_logits(self, tokens: Tensor, layout: PackedLayout, rows: Tensor) -> Tensor:
        """Logits (N, V) for the tokens at packed indices `rows` (N,) int64; the shift is done here."""
        return self.head(self.masked_hidden(tokens, layout, rows))

    def forward(self, tokens: Tensor, layout: PackedLayout, rows: Tensor) -> Tensor:
        """`masked_logits`, so that the module can be called (and wrapped) in training."""
        return self.masked_logits(tokens, layout, rows)

    def initialise(self, seed: int) -> None:
        """Fresh weights for training: normal with `initializer_range`, norms one, biases zero."""
        initialise(self, self.config.initializer_range, seed)

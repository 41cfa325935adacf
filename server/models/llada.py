"""LLaDA (LLaDA-8B, LLaDA-1.5): Llama blocks, bidirectional, logits in place.

Parameter names are those of the published checkpoints, which keep OLMo's: in a block, SwiGLU is
`ff_out(silu(ff_proj(x)) * up_proj(x))`; beside the blocks, `ff_out` is the LM head. No biases.
Shapes are packed: S tokens, width d.
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
class LLaDAConfig:
    """The published config.json, as far as the network depends on it. `vocab_size` is the embedding's width."""

    vocab_size: int
    d_model: int
    mlp_hidden_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    mask_token_id: int
    max_sequence_length: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    init_std: float = 0.02
    weight_tying: bool = False

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.d_model // self.n_heads

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> LLaDAConfig:
        """From a parsed config.json. Raises ConfigurationError for what is missing, wrong or not implemented."""
        read = ConfigReader(raw)
        read.require("block_type", "llama")
        read.require("activation_type", "silu")
        read.require("layer_norm_type", "rms")
        read.require("rope", True)
        read.require("rope_scaling")
        read.require("quantization_config")
        read.require("block_group_size", 1)
        read.require("clip_qkv")
        read.require("attention_dropout", 0, 0.0)
        read.require("residual_dropout", 0, 0.0)
        read.require("embedding_dropout", 0, 0.0)
        for key in (
            "alibi", "attention_layer_norm", "bias_for_layer_norm", "include_bias", "include_qkv_bias",
            "input_emb_norm", "scale_logits",
        ):  # fmt: skip
            read.require(key, False)
        read.require("layer_norm_with_affine", True)
        heads = read.integer("n_heads")
        key_heads = 1 if read.flag("multi_query_attention", False) else heads
        width = read.integer("d_model")
        vocab_size = read.integer("vocab_size")
        config = cls(
            # OLMo's embedding_size pads the vocabulary; the head has that width too.
            vocab_size=read.integer("embedding_size", vocab_size, minimum=vocab_size),
            d_model=width,
            mlp_hidden_size=read.integer("mlp_hidden_size", read.integer("mlp_ratio", 4) * width),
            n_layers=read.integer("n_layers"),
            n_heads=heads,
            n_kv_heads=read.integer("n_kv_heads", key_heads),
            mask_token_id=read.integer("mask_token_id", minimum=0),
            max_sequence_length=read.integer("max_sequence_length"),
            rms_norm_eps=read.number("rms_norm_eps", 1e-5),
            rope_theta=read.rope_theta(10000.0),
            init_std=read.number("init_std", 0.02),
            weight_tying=read.flag("weight_tying", False),
        )
        read.divides("d_model", width, "2 * n_heads", 2 * heads)
        read.divides("n_heads", heads, "n_kv_heads", config.n_kv_heads)
        return config


class LLaDABlock(nn.Module):
    """Attention, then SwiGLU, each behind its norm and added to the stream."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width, key_width = config.d_model, config.n_kv_heads * config.head_dim
        self.q_proj = Linear(width, width, bias=False)
        self.k_proj = Linear(width, key_width, bias=False)
        self.v_proj = Linear(width, key_width, bias=False)
        self.attn_out = Linear(width, width, bias=False)
        self.ff_proj = Linear(width, config.mlp_hidden_size, bias=False)
        self.up_proj = Linear(width, config.mlp_hidden_size, bias=False)
        self.ff_out = Linear(config.mlp_hidden_size, width, bias=False)
        self.attn_norm = RMSNorm(width, config.rms_norm_eps)
        self.ff_norm = RMSNorm(width, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention, rows: Tensor | None) -> Tensor:
        """(S, d) -> (S, d), or (N, d) where only `rows` (N,) are read afterwards."""
        heads = (-1, self.head_dim)
        normed = self.attn_norm(x)
        q = rotate(self.q_proj(normed).unflatten(-1, heads), cos, sin)
        k = rotate(self.k_proj(normed).unflatten(-1, heads), cos, sin)
        mixed = attention(q, k, self.v_proj(normed).unflatten(-1, heads)).flatten(1)
        if rows is not None:
            x, mixed = x[rows], mixed[rows]
        x = x + self.attn_out(mixed)
        normed = self.ff_norm(x)
        out: Tensor = x + self.ff_out(swiglu(self.ff_proj(normed), self.up_proj(normed)))
        return out


class LLaDATransformer(nn.Module):
    """Embeddings, blocks, final norm and, unless tied, the head: `model.transformer` in the checkpoint."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.wte = Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(LLaDABlock(config) for _ in range(config.n_layers))
        self.ln_f = RMSNorm(config.d_model, config.rms_norm_eps)
        if not config.weight_tying:
            self.ff_out = Linear(config.d_model, config.vocab_size, bias=False)
        self.rotary = RotaryTable(config.head_dim, config.rope_theta)
        self.attention_backend = "sdpa"

    @property
    def activation_dtype(self) -> torch.dtype:
        """What states are in."""
        return self.wte.activation_dtype

    def forward(self, tokens: Tensor, layout: PackedLayout, rows: Tensor | None) -> Tensor:
        """tokens (S,) -> final-norm states (S, d) or, at `rows`, (N, d)."""
        cos, sin = self.rotary.rows(layout.positions, layout.max_length, self.activation_dtype)
        return self.states(tokens, cos, sin, partial(attend, layout=layout, backend=self.attention_backend), rows)

    def states(self, tokens: Tensor, cos: Tensor, sin: Tensor, attention: Attention, rows: Tensor | None) -> Tensor:
        """The same from rotations (S, 1, head_dim / 2) and attention: a function of tensors alone."""
        x: Tensor = self.wte(tokens)
        last = len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            # Behind the last attention nothing mixes positions: the rest is computed only where it is read.
            x = block(x, cos, sin, attention, rows if index == last else None)
        out: Tensor = self.ln_f(x)
        return out


class LLaDABackbone(nn.Module):
    """The level that the published names have between the model and its transformer."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.transformer = LLaDATransformer(config)


class LLaDAModel(nn.Module):
    """The LLaDA family (see `base.DiffusionModel`). Tied embeddings are one parameter, `model.transformer.wte`."""

    family = "llada"
    shifts = False

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.mask_token_id = config.mask_token_id
        self.context_length = config.max_sequence_length
        # Some checkpoints with tied embeddings store them twice.
        self.ignored_weights = ("model.transformer.ff_out.weight",) if config.weight_tying else ()
        self.model = LLaDABackbone(config)
        self.trunk: Trunk = self.model.transformer.forward

    @property
    def backbone(self) -> Backbone:
        """Embeddings, blocks and final norm, for `models.acceleration`, which may put something faster in the place of
        its `forward`, `trunk`."""
        return self.model.transformer

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.transformer.wte.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return self.model.transformer.wte.weight.dtype

    @property
    def activation_dtype(self) -> torch.dtype:
        """What hidden states and logits are in: the weights' dtype, or float32 where the device has no instructions
        for a narrower one."""
        return self.model.transformer.activation_dtype

    @property
    def shape(self) -> DecoderShape:
        """Sizes of the blocks."""
        config = self.config
        return DecoderShape(
            config.d_model,
            config.mlp_hidden_size,
            config.n_heads,
            config.n_kv_heads,
            config.head_dim,
            config.n_layers,
        )

    def hidden(self, tokens: Tensor, layout: PackedLayout, rows: Tensor | None = None) -> Tensor:
        """Final-norm hidden states (S, d) of tokens (S,) int64; with `rows` (N,) only those packed indices (N, d)."""
        return self.trunk(tokens, layout, rows)

    def head(self, hidden: Tensor) -> Tensor:
        """(N, d) -> logits (N, V)."""
        head = self.model.transformer.wte if self.config.weight_tying else self.model.transformer.ff_out
        return linear(hidden, head.weight)

    def masked_hidden(self, tokens: Tensor, layout: PackedLayout, rows: Tensor) -> Tensor:
        """`masked_logits` before the head, (N, d)."""
        return self.hidden(tokens, layout, source_rows(layout, rows, shifts=self.shifts))

    def masked_logits(self, tokens: Tensor, layout: PackedLayout, rows: Tensor) -> Tensor:
        """Logits (N, V) for the tokens at packed indices `rows` (N,) int64."""
        return self.head(self.masked_hidden(tokens, layout, rows))

    def forward(self, tokens: Tensor, layout: PackedLayout, rows: Tensor) -> Tensor:
        """`masked_logits`, so that the module can be called (and wrapped) in training."""
        return self.masked_logits(tokens, layout, rows)

    def initialise(self, seed: int) -> None:
        """Fresh weights for training: normal with `init_std`, norms one."""
        initialise(self, self.config.init_std, seed)

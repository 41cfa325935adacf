"""Dream (Dream-v0, Dream-Coder, DiffuCoder): Qwen2 blocks, bidirectional, with shifted logits.

Dream was made from an autoregressive model, hence the shift: the output at i - 1 predicts position i.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.models.base import DiffusionModel
from server.models.config import ConfigReader
from server.models.layers import DecoderConfig, Variant


class DreamModel(DiffusionModel):
    """The Dream family."""

    family = "dream"
    architecture = "DreamModel"
    shifts = True
    variant = Variant(qkv_bias=True)

    @classmethod
    def read_config(cls, raw: Mapping[str, Any]) -> DecoderConfig:
        """See `DiffusionModel.read_config`."""
        read = ConfigReader(raw)
        read.require("hidden_act", "silu")
        read.require("rope_scaling")
        read.require("quantization_config")
        read.require("use_sliding_window", False)
        read.require_all("layer_types", "full_attention")
        read.require("attention_dropout", 0, 0.0)
        heads = read.integer("num_attention_heads")
        config = DecoderConfig(
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

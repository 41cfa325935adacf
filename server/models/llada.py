"""LLaDA (LLaDA-8B, LLaDA-1.5): Llama blocks, bidirectional, logits in place.

Published checkpoints keep OLMo's names: in a block, SwiGLU is `ff_out(silu(ff_proj(x)) * up_proj(x))`; beside the
blocks, `ff_out` is the LM head. No biases.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.models.base import DiffusionModel
from server.models.config import ConfigReader
from server.models.layers import DecoderConfig

_OFF = (
    "alibi", "attention_layer_norm", "bias_for_layer_norm", "include_bias", "include_qkv_bias", "input_emb_norm",
    "scale_logits",
)  # fmt: skip


class LLaDAModel(DiffusionModel):
    """The LLaDA family."""

    family = "llada"
    architecture = "LLaDAModelLM"
    stored_names = (
        ("model.embed_tokens.", "model.transformer.wte."),
        ("model.layers.", "model.transformer.blocks."),
        ("model.norm.", "model.transformer.ln_f."),
        ("lm_head.", "model.transformer.ff_out."),
        (".self_attn.o_proj.", ".attn_out."),
        (".self_attn.", "."),
        (".mlp.gate_proj.", ".ff_proj."),
        (".mlp.down_proj.", ".ff_out."),
        (".mlp.", "."),
        (".input_layernorm.", ".attn_norm."),
        (".post_attention_layernorm.", ".ff_norm."),
    )

    @classmethod
    def read_config(cls, raw: Mapping[str, Any]) -> DecoderConfig:
        """See `DiffusionModel.read_config`."""
        read = ConfigReader(raw)
        read.require("block_type", "llama")
        read.require("activation_type", "silu")
        read.require("layer_norm_type", "rms")
        read.require("rope", True)
        read.require("rope_scaling")
        read.require("quantization_config")
        read.require("block_group_size", 1)
        read.require("clip_qkv")
        for key in ("attention_dropout", "residual_dropout", "embedding_dropout"):
            read.require(key, 0, 0.0)
        for key in _OFF:
            read.require(key, False)
        read.require("layer_norm_with_affine", True)
        heads, width, vocab_size = read.integer("n_heads"), read.integer("d_model"), read.integer("vocab_size")
        key_heads = 1 if read.flag("multi_query_attention", False) else heads
        config = DecoderConfig(
            # OLMo's embedding_size pads the vocabulary; the head has that width too.
            vocab_size=read.integer("embedding_size", vocab_size, minimum=vocab_size),
            hidden_size=width,
            intermediate_size=read.integer("mlp_hidden_size", read.integer("mlp_ratio", 4) * width),
            num_hidden_layers=read.integer("n_layers"),
            num_attention_heads=heads,
            num_key_value_heads=read.integer("n_kv_heads", key_heads),
            mask_token_id=read.integer("mask_token_id", minimum=0),
            max_position_embeddings=read.integer("max_sequence_length"),
            rms_norm_eps=read.number("rms_norm_eps", 1e-5),
            rope_theta=read.rope_theta(10000.0),
            initializer_range=read.number("init_std", 0.02),
            tie_word_embeddings=read.flag("weight_tying", False),
        )
        read.divides("d_model", width, "2 * n_heads", 2 * heads)
        read.divides("n_heads", heads, "n_kv_heads", config.num_key_value_heads)
        return config

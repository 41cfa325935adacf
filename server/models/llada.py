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
_DROPOUTS = ("attention_dropout", "residual_dropout", "embedding_dropout")


class LLaDAModel(DiffusionModel):
    """The LLaDA family."""

    family = "llada"
    architecture = "LLaDAModelLM"
    published = ("GSAI-ML/LLaDA-8B-Instruct", "GSAI-ML/LLaDA-8B-Base", "GSAI-ML/LLaDA-1.5")
    fixed = {  # noqa: RUF012
        "block_type": ("llama",),
        "activation_type": ("silu",),
        "layer_norm_type": ("rms",),
        "layer_norm_with_affine": (True,),
        "rope": (True,),
        "block_group_size": (1,),
        "clip_qkv": (),
        **dict.fromkeys(_OFF, (False,)),
        **dict.fromkeys(_DROPOUTS, (0, 0.0)),
    }
    keys = {  # noqa: RUF012
        "vocab_size": "embedding_size",
        "hidden_size": "d_model",
        "intermediate_size": "mlp_hidden_size",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "max_position_embeddings": "max_sequence_length",
        "tie_word_embeddings": "weight_tying",
    }
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
        """With the sizes that OLMo derives from others. Its embedding_size pads the vocabulary, and the head has that
        width too."""
        read = ConfigReader(raw)
        rows, heads = read.integer("vocab_size"), read.integer("n_heads")
        key_heads = 1 if read.flag("multi_query_attention", False) else heads
        derived = {
            "embedding_size": read.integer("embedding_size", rows, minimum=rows),
            "mlp_hidden_size": read.integer("mlp_hidden_size", read.integer("mlp_ratio", 4) * read.integer("d_model")),
            "n_kv_heads": read.integer("n_kv_heads", key_heads),
            "rms_norm_eps": read.number("rms_norm_eps", 1e-5),
        }
        return super().read_config({**raw, **derived})

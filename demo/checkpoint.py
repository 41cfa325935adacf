"""Writing the demo checkpoints in exactly the published layout, and the model card beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import Qwen3ForSequenceClassification

from demo.tokenizer import END_OF_TEXT, IM_END, MASK, save_tokenizer, token_id, write_json
from demo.train_dlm import INITIAL_STD
from server.models.dream import DreamModel

REWARD_KEYS = (
    "attention_bias",
    "attention_dropout",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "id2label",
    "initializer_range",
    "intermediate_size",
    "label2id",
    "layer_types",
    "max_position_embeddings",
    "max_window_layers",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "eos_token_id",
    "rms_norm_eps",
    "sliding_window",
    "tie_word_embeddings",
    "use_cache",
    "use_sliding_window",
    "vocab_size",
)  # of transformers' config, as published
DEFAULT_CANVAS = 48  # tokens; the corpus' longest answers just fit


def save_weights(module: torch.nn.Module, folder: Path) -> int:
    """model.safetensors in bfloat16, half the size of what was trained; config.json says that they are meant for
    float32, so that every processor gives the same tokens. Returns the number of parameters."""
    tensors = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in module.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(tensor.numel() for tensor in tensors.values())


def save_dlm(model: DreamModel, tokenizer: Tokenizer, folder: Path) -> int:
    """The diffusion LM as Dream-v0-Instruct-7B is published. Returns the number of parameters."""
    save_tokenizer(tokenizer, folder, eos=END_OF_TEXT, mask=MASK)
    config, eos = model.config, token_id(tokenizer, END_OF_TEXT)
    write_json(
        folder / "config.json",
        {
            "architectures": ["DreamModel"],
            "attention_dropout": 0.0,
            "bos_token_id": eos,
            "dtype": "float32",
            "eos_token_id": eos,
            "hidden_act": "silu",
            "hidden_size": config.hidden,
            "initializer_range": INITIAL_STD,
            "intermediate_size": config.intermediate,
            "mask_token_id": config.mask_token_id,
            "max_position_embeddings": config.context_length,
            "max_window_layers": config.layers,
            "model_type": "Dream",
            "num_attention_heads": config.heads,
            "num_hidden_layers": config.layers,
            "num_key_value_heads": config.key_heads,
            "pad_token_id": eos,
            "rms_norm_eps": config.rms_norm_eps,
            "rope_scaling": None,
            "rope_theta": config.rope_theta,
            "sliding_window": None,
            "tie_word_embeddings": config.tie_word_embeddings,
            "use_cache": False,
            "use_sliding_window": False,
            "vocab_size": config.vocab_size,
        },
    )
    write_json(
        folder / "generation_config.json",
        {
            "alg": "entropy",
            "alg_temp": None,
            "bos_token_id": eos,
            "eos_token_id": eos,
            "eps": 0.001,
            "mask_token_id": config.mask_token_id,
            "max_new_tokens": DEFAULT_CANVAS,
            "output_history": False,
            "pad_token_id": eos,
            "return_dict": False,
            "steps": DEFAULT_CANVAS,
            "temperature": 0.7,
            "top_k": None,
            "top_p": 0.95,
        },
    )
    return save_weights(model, folder)


def save_reward(model: Qwen3ForSequenceClassification, tokenizer: Tokenizer, folder: Path) -> int:
    """A reward model as Skywork-Reward-V2-Qwen3 is published. Returns the number of parameters."""
    save_tokenizer(tokenizer, folder, eos=IM_END, mask=None)
    config: dict[str, Any] = model.config.to_dict()
    rope = config.get("rope_parameters") or {}
    write_json(
        folder / "config.json",
        {
            "architectures": ["Qwen3ForSequenceClassification"],
            "dtype": "float32",
            "rope_scaling": None,
            "rope_theta": rope.get("rope_theta", 10000.0),
            **{key: config[key] for key in REWARD_KEYS},
        },
    )
    return save_weights(model, folder)

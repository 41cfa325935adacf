"""Random-weight checkpoints in the published layouts, at any size, to measure speed with.

`python -m benchmarks.checkpoints DIR` writes the generated pair of the throughput benchmarks.

Their text is noise; their shapes, tokenizers, files and code path are those of real checkpoints. The tokenizer is a
byte-level BPE without merges whose vocabulary is filled up with tokens that no text produces.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

SPECIAL = {"eos_token": "<|endoftext|>", "start": "<|im_start|>", "end": "<|im_end|>", "mask_token": "<|mask|>"}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a decoder stack; without `key_heads` there are as many as heads."""

    vocab_size: int
    hidden: int
    layers: int
    heads: int
    intermediate: int
    key_heads: int | None = None


DREAM_13M = Shape(16_384, 256, 6, 8, 768)
REWARD_5M = Shape(16_384, 192, 4, 6, 576)
SDAR_40M = Shape(16_384, 512, 8, 8, 1536, 4)
LLADA_126K = Shape(126_464, 256, 6, 8, 768)


def write_tokenizer(folder: Path, vocab_size: int, *, order_seed: int, mask: bool) -> dict[str, int]:
    """tokenizer.json, its configuration and the chat template; returns the special tokens' ids."""
    strings = [SPECIAL["eos_token"], SPECIAL["start"], SPECIAL["end"]] + ([SPECIAL["mask_token"]] if mask else [])
    plain = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain += [f"filler{index}" for index in range(vocab_size - len(plain) - len(strings))]
    random.Random(order_seed).shuffle(plain)
    vocab = {token: index for index, token in enumerate(strings + plain)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in strings])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {"eos_token": SPECIAL["eos_token"], "pad_token": SPECIAL["eos_token"]}
    settings |= {"mask_token": SPECIAL["mask_token"]} if mask else {}
    _write_json(folder / "tokenizer_config.json", settings)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return {token: vocab[token] for token in strings}


def write_dream(folder: Path, shape: Shape, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """A Dream-shaped diffusion LM (DreamModel layout)."""
    ids = write_tokenizer(folder, shape.vocab_size, order_seed=0, mask=True)
    config = _decoder_config(shape, dtype) | {"architectures": ["DreamModel"], "model_type": "Dream"}
    config |= {"mask_token_id": ids[SPECIAL["mask_token"]], "tie_word_embeddings": False}
    _write_json(folder / "config.json", config)
    tensors = _decoder_tensors(shape, _generator(seed), qkv_bias=True, head_norm=False)
    tensors["lm_head.weight"] = _normal(_generator(seed + 1), shape.vocab_size, shape.hidden, scale=4.0)
    return _save(folder, tensors, dtype)


def write_sdar(folder: Path, shape: Shape, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """An SDAR-shaped diffusion LM (SDARForCausalLM layout) with blocks of 4."""
    ids = write_tokenizer(folder, shape.vocab_size, order_seed=0, mask=True)
    config = _decoder_config(shape, dtype) | {"architectures": ["SDARForCausalLM"], "model_type": "sdar"}
    config |= {"mask_token_id": ids[SPECIAL["mask_token"]], "tie_word_embeddings": False, "block_size": 4}
    _write_json(folder / "config.json", config)
    tensors = _decoder_tensors(shape, _generator(seed), qkv_bias=False, head_norm=True)
    tensors["lm_head.weight"] = _normal(_generator(seed + 1), shape.vocab_size, shape.hidden, scale=4.0)
    return _save(folder, tensors, dtype)


def write_llada(folder: Path, shape: Shape, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """A LLaDA-shaped diffusion LM (LLaDAModelLM layout)."""
    ids = write_tokenizer(folder, shape.vocab_size, order_seed=0, mask=True)
    _write_json(
        folder / "config.json",
        {
            "architectures": ["LLaDAModelLM"], "model_type": "llada", "d_model": shape.hidden,
            "n_layers": shape.layers, "n_heads": shape.heads, "n_kv_heads": shape.heads,
            "mlp_hidden_size": shape.intermediate, "vocab_size": shape.vocab_size, "embedding_size": shape.vocab_size,
            "max_sequence_length": 4096, "rope_theta": 500_000.0, "rms_norm_eps": 1e-5, "weight_tying": False,
            "include_bias": False, "include_qkv_bias": False, "layer_norm_type": "rms", "block_type": "llama",
            "activation_type": "silu", "rope": True, "alibi": False, "dtype": str(dtype).removeprefix("torch."),
            "mask_token_id": ids[SPECIAL["mask_token"]], "eos_token_id": 0, "pad_token_id": 0,
        },
    )  # fmt: skip
    generator, h, m = _generator(seed), shape.hidden, shape.intermediate
    prefix = "model.transformer"
    tensors = {f"{prefix}.wte.weight": _normal(generator, shape.vocab_size, h, scale=math.sqrt(h))}
    for layer in range(shape.layers):
        block = f"{prefix}.blocks.{layer}"
        tensors |= {f"{block}.{name}.weight": torch.ones(h) for name in ("attn_norm", "ff_norm")}
        tensors |= {f"{block}.{n}.weight": _normal(generator, h, h) for n in ("q_proj", "k_proj", "v_proj", "attn_out")}
        tensors |= {f"{block}.{name}.weight": _normal(generator, m, h) for name in ("ff_proj", "up_proj")}
        tensors[f"{block}.ff_out.weight"] = _normal(generator, h, m)
    tensors[f"{prefix}.ln_f.weight"] = torch.ones(h)
    tensors[f"{prefix}.ff_out.weight"] = _normal(generator, shape.vocab_size, h, scale=4.0)
    return _save(folder, tensors, dtype)


def write_reward(folder: Path, shape: Shape, *, dtype: torch.dtype = torch.float32, seed: int = 2) -> Path:
    """A Qwen3 sequence classifier with one label; its ids are not the diffusion model's."""
    write_tokenizer(folder, shape.vocab_size, order_seed=1, mask=False)
    config = _decoder_config(shape, dtype) | {"architectures": ["Qwen3ForSequenceClassification"]}
    config |= {"model_type": "qwen3", "attention_bias": False, "head_dim": shape.hidden // shape.heads}
    config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "tie_word_embeddings": False}
    _write_json(folder / "config.json", config)
    generator = _generator(seed)
    tensors = _decoder_tensors(shape, generator, qkv_bias=False, head_norm=True)
    tensors["score.weight"] = _normal(generator, 1, shape.hidden, scale=4.0)
    return _save(folder, tensors, dtype)


def write_pair(folder: Path) -> tuple[Path, Path]:
    """The generated pair of the throughput benchmarks: a 13 M Dream-shaped model and a 5 M reward model, float32."""
    return write_dream(folder / "dlm", DREAM_13M), write_reward(folder / "rm", REWARD_5M)


def _decoder_config(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_size": shape.hidden, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_heads or shape.heads, "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "hidden_act": "silu",
        "dtype": str(dtype).removeprefix("torch."), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip


def _decoder_tensors(shape: Shape, generator: torch.Generator, *, qkv_bias: bool, head_norm: bool) -> dict[str, Tensor]:
    h, m = shape.hidden, shape.intermediate
    width = h // shape.heads * (shape.key_heads or shape.heads)
    tensors = {
        "model.embed_tokens.weight": _normal(generator, shape.vocab_size, h, scale=math.sqrt(h)),
        "model.norm.weight": torch.ones(h),
    }
    for layer in range(shape.layers):
        block = f"model.layers.{layer}"
        tensors |= {f"{block}.{name}.weight": torch.ones(h) for name in ("input_layernorm", "post_attention_layernorm")}
        rows = {"q": h, "k": width, "v": width, "o": h}
        tensors |= {f"{block}.self_attn.{name}_proj.weight": _normal(generator, rows[name], h) for name in "qkvo"}
        tensors |= {f"{block}.mlp.{name}_proj.weight": _normal(generator, m, h) for name in ("gate", "up")}
        tensors[f"{block}.mlp.down_proj.weight"] = _normal(generator, h, m)
        if qkv_bias:
            tensors |= {f"{block}.self_attn.{name}_proj.bias": torch.zeros(rows[name]) for name in "qkv"}
        if head_norm:
            size = h // shape.heads
            tensors |= {f"{block}.self_attn.{name}_norm.weight": torch.ones(size) for name in "qk"}
    return tensors


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _normal(generator: torch.Generator, rows: int, columns: int, *, scale: float = 1.0) -> Tensor:
    return torch.randn(rows, columns, generator=generator) * (scale / math.sqrt(columns))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2))


def _save(folder: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> Path:
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def main() -> None:
    """Write the pair to a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    for path in write_pair(parser.parse_args().folder):
        print(path)


if __name__ == "__main__":
    main()

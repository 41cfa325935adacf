"""Reward models of any architecture, written as published ones are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    GemmaConfig,
    GemmaForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

from tests.support.models import GOLDEN

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 511,
    "max_position_embeddings": 512,
    "num_labels": 1,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
FAMILIES: dict[str, Any] = {
    "llama": (LlamaConfig, LlamaForSequenceClassification),
    "qwen2": (Qwen2Config, Qwen2ForSequenceClassification),
    "gemma": (GemmaConfig, GemmaForSequenceClassification),
    "mistral": (MistralConfig, MistralForSequenceClassification),  # without its window
}


def write_reward_model(folder: Path, family: str, *, template: str = "", **changes: Any) -> Path:
    """A random checkpoint of a family with the golden reward tokenizer, in the published layout."""
    config_class, model_class = FAMILIES[family]
    if family == "mistral":
        changes = {"sliding_window": None, **changes}
    torch.manual_seed(1)
    model_class(config_class(**{**SMALL, **changes})).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        shutil.copy(GOLDEN / "dream-tiny/rm" / name, folder / name)
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes a key."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def load_stock(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    """As transformers has it."""
    stock = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    return stock.eval().requires_grad_(False)

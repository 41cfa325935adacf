"""Reward models of any architecture, written as published ones are, and one pass of guidance through a model."""

from __future__ import annotations

import json
import shutil
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    GemmaConfig,
    GemmaForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

from server.guidance.assembly import Assembly, Objective, Responses, Timings
from server.guidance.prefixes import RewardContext
from server.rewards.reward_model import RewardModel
from server.text.template import split_at_response
from server.types import Message
from tests.support.models import CPU, GOLDEN

EOS, PAD = 7, 9
"""Ids of the diffusion model's that hide positions in the tests of passes."""

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
    "gpt2": (GPT2Config, GPT2ForSequenceClassification),
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


def exact_norms(network: Any) -> None:
    """transformers' RMSNorms round to float32 inside even a float64 model; let them compute in float64."""

    def forward(self: Any, x: Tensor) -> Tensor:
        epsilon = self.eps if hasattr(self, "eps") else self.variance_epsilon
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)
        weight = 1.0 + self.weight if type(self).__name__.startswith("Gemma") else self.weight
        return weight * (x * scale)

    for norm in network.modules():
        if type(norm).__name__.endswith("RMSNorm"):
            norm.forward = types.MethodType(forward, norm)


def contexts(model: RewardModel, count: int, *, cached: bool = True) -> list[RewardContext]:
    """What `count` trajectories of two conversations in turn have around their responses."""
    texts = "Hello", "Write about the licence."
    around = [split_at_response(model.tokenizer, (Message("user", text),)) for text in texts]
    of = RewardContext.of(model, around, cached=cached)
    return [of[index % 2] for index in range(count)]


def embeddings(model: RewardModel, count: int, seed: int = 3) -> Tensor:
    """Random ones, (count, D) float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, model.hidden_size, dtype=torch.float64, generator=generator)


class Pass:
    """Everything that one pass reads; `visible` (R,) as the committed tokens alone have it."""

    def __init__(
        self,
        model: RewardModel,
        known: Sequence[RewardContext],
        canvases: Sequence[np.ndarray],
        positions: Sequence[np.ndarray],
        pad_token_id: int = PAD,
        device: torch.device = CPU,
    ) -> None:
        self.responses = Responses.of(canvases, positions, eos_token_id=EOS, pad_token_id=pad_token_id)
        self.visible = self.responses.visible(self.responses.committed)
        self.objective = Objective(model, tuple(known), torch.ones(len(canvases), dtype=torch.float64))
        self.device = device

    def assembled(self) -> tuple[Responses, Assembly]:
        """On the device, as the attention that the model has now wants it."""
        responses, (assembly,) = Assembly.of([self.objective], self.responses, self.device)
        return responses, assembly

    def read(self, embeds: Tensor, *, gradient: bool = True) -> tuple[Tensor, Tensor]:
        """Rewards (B,) and dr/de (N, D)."""
        responses, assembly = self.assembled()
        visible, place, whole = self.visible.to(self.device), assembly.places.place, assembly.base.clone()
        whole[place] = embeds.to(whole.dtype)
        rewards, g = assembly.read(whole, responses.committed, visible, Timings(), gradient=gradient)
        return rewards, g.to(embeds.dtype)

"""Pairs of published sizes without a checkpoint: on `meta` shapes alone, on a device with random weights in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from benchmarks.checkpoints import SPECIAL, write_tokenizer
from benchmarks.full_size import DREAM_7B, TOKENIZER_SIZE
from benchmarks.workload import NAMES
from server.models.base import DiffusionModel
from server.models.dream import DreamModel
from server.models.layers import DecoderConfig
from server.models.loading import LoadedDiffusionModel
from server.rewards.attention import ATTENTION_NAME
from server.rewards.reward_model import RewardModel
from server.text.tokenizer import Tokenizer
from server.types import DecoderShape, ModelInfo, RewardModelInfo

CONTEXT = 2048
DREAM = replace(DreamModel.read_config(DREAM_7B), context_length=CONTEXT)
REWARDS = {
    "0.6B": DecoderShape(hidden=1024, intermediate=3072, heads=16, key_heads=8, head_size=128, layers=28),
    "1.7B": DecoderShape(hidden=2048, intermediate=6144, heads=16, key_heads=8, head_size=128, layers=28),
    "4B": DecoderShape(hidden=2560, intermediate=9728, heads=32, key_heads=8, head_size=128, layers=36),
}
"""Skywork-Reward-V2 on Qwen3 of these sizes."""
REWARD_VOCABULARY = 151_936

_TINY = DecoderShape(hidden=64, intermediate=96, heads=4, key_heads=2, head_size=16, layers=2)
TINY_DREAM = DecoderConfig(
    hidden=64, intermediate=96, heads=4, key_heads=2, head_size=16, layers=2, vocab_size=320, context_length=CONTEXT
)
TINY_REWARDS = {"tiny": _TINY}

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Texts:
    """A tokenizer that covers a vocabulary, where it lies, and the ids of its special tokens."""

    tokenizer: Tokenizer
    folder: Path
    ids: dict[str, int]

    @classmethod
    def of(cls, folder: Path, vocab_size: int) -> Texts:
        """Written into the folder: of as many tokens as Dream's has, or as fit."""
        ids = write_tokenizer(folder, min(TOKENIZER_SIZE, vocab_size), order_seed=0, mask=True)
        return cls(Tokenizer.load(folder), folder, ids)


def made(make: Callable[[], Module], device: torch.device, dtype: torch.dtype) -> Module:
    """A frozen network whose weights are made on the device, in `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            network = make()
    finally:
        torch.set_default_dtype(before)
    return network.requires_grad_(False).eval()


def diffusion_model(
    config: DecoderConfig,
    texts: Texts,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    family: type[DiffusionModel] = DreamModel,
) -> LoadedDiffusionModel:
    """A model of these sizes, as a checkpoint's loader would give it."""
    mask, eos = (texts.ids[SPECIAL[name]] for name in ("mask_token", "eos_token"))
    config = replace(config, mask_token_id=mask)
    model = made(lambda: family(config), device, dtype)
    model.model.freeze(stack=device.type == "cuda")
    info = ModelInfo(
        id=family.family,
        family=family.family,
        tokenizer_path=str(texts.folder),
        context_length=config.context_length,
        vocab_size=config.vocab_size,
        mask_token_id=mask,
        eos_token_id=eos,
        pad_token_id=eos,
        stop_token_ids=(eos,),
        default_max_tokens=128,
        dtype=NAMES[dtype],
        parameters=sum(weight.numel() for weight in model.parameters()),
    )
    return LoadedDiffusionModel(model, texts.tokenizer, info)


def reward_network(shape: DecoderShape, device: torch.device, dtype: torch.dtype, vocab_size: int) -> Any:
    """A Qwen3 reward model of these sizes, as transformers has it and `rewards.network` loads it."""
    from transformers import Qwen3Config, Qwen3ForSequenceClassification

    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        head_dim=shape.head_size,
        max_position_embeddings=16_384,
        num_labels=1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
    )

    def network() -> Any:
        return Qwen3ForSequenceClassification._from_config(config, dtype=dtype, attn_implementation=ATTENTION_NAME)

    built: Any = made(network, device, dtype)
    built.score.weight = nn.Parameter(built.score.weight.detach().float(), requires_grad=False)
    return built


def reward_model(
    shape: DecoderShape,
    loaded: LoadedDiffusionModel,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    vocab_size: int = REWARD_VOCABULARY,
) -> RewardModel:
    """The same, named `rm`, for the tokens of a diffusion model."""
    network = reward_network(shape, device, dtype, vocab_size)
    parameters = sum(weight.numel() for weight in network.parameters())
    info = RewardModelInfo("rm", "qwen3", 16_384, 1.0, "unk", NAMES[dtype], parameters)
    ids = [index % vocab_size for index in range(loaded.model.vocab_size)]
    return RewardModel("rm", network, loaded.tokenizer, ids, info)

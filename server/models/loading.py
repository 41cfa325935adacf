"""A diffusion model, its tokenizer and what the rest of the server needs to know, from one checkpoint folder.

Special ids come from config.json, then generation_config.json, then the tokenizer; a checkpoint that names one of
mask, EOS and pad nowhere is refused. The default canvas is generation_config.json's `max_new_tokens`, the standard
key for it, else `DEFAULT_MAX_TOKENS`, and half the context at most. The ids in a list of EOS after the first, and the
tokens that end a turn in known chat templates, stop the text beside EOS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels import varlen
from server.errors import ConfigurationError, quote
from server.hub import checkpoint_name, read_json, resolve_checkpoint
from server.models.base import DiffusionModel
from server.models.config import ConfigReader
from server.models.registry import PUBLISHED, family_of
from server.models.weights import load_weights
from server.text.tokenizer import Tokenizer
from server.types import Attention, BlocksFrom, ModelInfo

GENERATION = "generation_config.json"
DEFAULT_MAX_TOKENS = 128
END_OF_TURN_TOKENS = ("<|im_end|>", "<|eot_id|>")


@dataclass(frozen=True, slots=True)
class LoadedDiffusionModel:
    """A model ready to run, the tokenizer beside it, and plain facts about both."""

    model: DiffusionModel
    tokenizer: Tokenizer
    info: ModelInfo


def load_diffusion_model(
    path_or_id: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    attention: Attention = "auto",
    block_length: int | None = None,
) -> LoadedDiffusionModel:
    """Load a checkpoint of a family in the registry from a local folder or the hub, with its weights frozen.
    `attention` and `block_length` are the settings of these names.

    `owner/name@revision` pins a hub model. Weights are stored in bfloat16, float16, float32 or float64 and come out in
    `dtype` on `device`. Raises ConfigurationError, which names the key, file or tensors.
    """
    folder = checkpoint_folder(path_or_id)
    config = read_json(folder / "config.json")
    family = family_of(config)
    generation_file = folder / GENERATION
    generation = read_json(generation_file) if generation_file.is_file() else {}
    tokenizer = Tokenizer.load(folder)
    mask, *more_masks = _ids("mask_token_id", config, generation, tokenizer.mask_token_id)
    eos, *more_stops = _ids("eos_token_id", config, generation, tokenizer.eos_token_id)
    pad, *more_pads = _ids("pad_token_id", config, generation, tokenizer.pad_token_id)
    for key, token_id, more in (("mask_token_id", mask, more_masks), ("pad_token_id", pad, more_pads)):
        if more:
            raise ConfigurationError(f"{key} must be one id, not {quote([token_id, *more])}")
    if mask in (eos, *more_stops):
        raise ConfigurationError(f"mask_token_id and eos_token_id are both {mask}")
    name = checkpoint_name(path_or_id)
    blocks_from, block_length = _blocks(family, config, name, attention, block_length)
    with torch.device("meta"):
        model = family(family.read_config({**config, "mask_token_id": mask}))
    for key, token_id in (("mask_token_id", mask), ("eos_token_id", eos), ("pad_token_id", pad)):
        if token_id >= model.vocab_size:  # every id must have a row of logits
            raise ConfigurationError(f"{key} = {token_id} is outside the model's vocabulary of {model.vocab_size}")
    if tokenizer.vocab_size > model.vocab_size:
        sizes = f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {model.vocab_size}"
        raise ConfigurationError(f"{sizes}: they do not belong together")
    load_weights(
        model, folder, dtype=dtype, device=device, ignored=model.ignored_weights, stored_name=model.stored_name
    )
    model.model.freeze(stack=model.device.type == "cuda")  # a CPU's weights may be a mapped file, which processes share
    model.model.attention_backend = varlen.choose("auto", model.device, model.activation_dtype, model.shape.head_size)
    turns = [tokenizer.id_of(token) for token in END_OF_TURN_TOKENS]
    canvas = ConfigReader(generation, GENERATION).integer("max_new_tokens", DEFAULT_MAX_TOKENS)
    info = ModelInfo(
        id=name,
        family=family.family,
        tokenizer_path=str(folder.resolve()),
        context_length=model.context_length,
        vocab_size=model.vocab_size,
        mask_token_id=mask,
        eos_token_id=eos,
        pad_token_id=pad,
        stop_token_ids=tuple(dict.fromkeys((eos, *more_stops, *(turn for turn in turns if turn is not None)))),
        default_max_tokens=min(canvas, max(1, model.context_length // 2)),  # so that a prompt fits too
        dtype=str(dtype).removeprefix("torch."),
        parameters=sum(weight.numel() for weight in model.parameters()),
        diffusion_defaults=dict(family.diffusion_defaults)
        | ({"schedule": "even"} if blocks_from else {})
        | ({"block_length": block_length} if block_length else {}),
        blocks_from=blocks_from,
        template_arguments=dict(family.template_arguments),
    )
    return LoadedDiffusionModel(model, tokenizer, info)


def checkpoint_folder(path_or_id: str | Path) -> Path:
    """Where a diffusion model's checkpoint is, fetched if need be. Raises ConfigurationError."""
    return resolve_checkpoint(path_or_id, check_config=family_of, known=PUBLISHED)


def _blocks(
    family: type[DiffusionModel],
    config: Mapping[str, Any],
    name: str,
    attention: Attention,
    block_length: int | None,
) -> tuple[BlocksFrom | None, int | None]:
    """Where a checkpoint's blocks are counted from, None for full attention, and how long they are, None where only the
    family says. The settings come first; without them config.json, the published id and the family tell."""
    read = ConfigReader(config)
    own = next((read.integer(key) for key in ("block_length", "block_size") if config.get(key) is not None), None)
    own = own or family.block_lengths.get(name)
    if attention == "full" or (attention == "auto" and own is None and not family.block_causal):
        return None, block_length
    if family.shifts:
        raise ConfigurationError(f"attention: block_causal is not implemented for {family.family}, whose logits shift")
    length = block_length or own or family.diffusion_defaults.get("block_length")
    if length is None:
        raise ConfigurationError(
            "block_length: attention is block_causal, and neither the settings nor config.json (block_length, "
            "block_size) nor the family say how long the blocks are"
        )
    return family.blocks_from, int(length)


def _ids(key: str, config: Mapping[str, Any], generation: Mapping[str, Any], tokenizer_id: int | None) -> list[int]:
    """The ids of the first of config, generation config and tokenizer that has any."""
    for value in (config.get(key), generation.get(key), tokenizer_id):
        if value is None or value == []:
            continue
        values = value if isinstance(value, list) else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in values):
            raise ConfigurationError(f"{key} must be a token id, not {quote(value)}")
        return values
    raise ConfigurationError(f"neither config.json nor generation_config.json nor the tokenizer has {key}")

"""A diffusion model, its tokenizer and what the rest of the server needs to know, from one checkpoint folder.

Special ids come from config.json, then generation_config.json, then the tokenizer; a checkpoint that names one of
mask, EOS and pad nowhere is refused. The default canvas is generation_config.json's `max_new_tokens`, the standard
key for it, else the registry's.
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
from server.models.registry import (
    DEFAULT_MAX_TOKENS,
    END_OF_TURN_TOKENS,
    family_of,
    known_ids,
    known_model,
)
from server.models.weights import load_weights
from server.text.tokenizer import Tokenizer
from server.types import ModelInfo


@dataclass(frozen=True, slots=True)
class LoadedDiffusionModel:
    """A model ready to run, the tokenizer beside it, and plain facts about both."""

    model: DiffusionModel
    tokenizer: Tokenizer
    info: ModelInfo


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """Mask, EOS and pad. `stop` ends the text: EOS first, its alternatives, then end-of-turn tokens."""

    mask: int
    eos: int
    pad: int
    stop: tuple[int, ...]


def load_diffusion_model(
    path_or_id: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LoadedDiffusionModel:
    """Load a checkpoint of a family in the registry from a local folder or the hub, with its weights frozen.

    `owner/name@revision` pins a hub model. Weights are stored in bfloat16, float16, float32 or float64 and come out in
    `dtype` on `device`. Raises ConfigurationError, which names the key, file or tensors.
    """
    name = checkpoint_name(path_or_id)
    row = known_model(name)
    folder = checkpoint_folder(path_or_id)
    config = read_json(folder / "config.json")
    family = family_of(config)
    generation_file = folder / "generation_config.json"
    generation = read_json(generation_file) if generation_file.is_file() else {}
    tokenizer = Tokenizer.load(folder)
    ids = special_ids(config, generation, tokenizer)
    with torch.device("meta"):
        model = family(family.read_config({**config, "mask_token_id": ids.mask}))
    _check_ids(ids, tokenizer, model.vocab_size)
    load_weights(
        model, folder, dtype=dtype, device=device, ignored=model.ignored_weights, stored_name=model.stored_name
    )
    where = model.device, model.activation_dtype, model.shape.head_size
    model.model.attention_backend = varlen.choose("auto", *where)
    default = row.max_tokens if row is not None else DEFAULT_MAX_TOKENS
    info = ModelInfo(
        id=name,
        family=family.family,
        tokenizer_path=str(folder.resolve()),
        context_length=model.context_length,
        vocab_size=model.vocab_size,
        mask_token_id=ids.mask,
        eos_token_id=ids.eos,
        pad_token_id=ids.pad,
        stop_token_ids=ids.stop,
        default_max_tokens=_default_max_tokens(generation, default, model.context_length),
        dtype=str(dtype).removeprefix("torch."),
    )
    return LoadedDiffusionModel(model, tokenizer, info)


def checkpoint_folder(path_or_id: str | Path) -> Path:
    """Where a diffusion model's checkpoint is, fetched if need be. Raises ConfigurationError."""
    return resolve_checkpoint(path_or_id, check_config=family_of, known=known_ids())


def special_ids(config: Mapping[str, Any], generation: Mapping[str, Any], tokenizer: Tokenizer) -> SpecialIds:
    """Mask, EOS and pad, each from the first of config, generation config and tokenizer that has it.

    `eos_token_id` may be a list: the first is EOS, the others are stop tokens. Raises ConfigurationError.
    """
    mask = _first("mask_token_id", config, generation, tokenizer.mask_token_id)
    eos = _first("eos_token_id", config, generation, tokenizer.eos_token_id)
    pad = _first("pad_token_id", config, generation, tokenizer.pad_token_id)
    for key, found in (("mask_token_id", mask), ("pad_token_id", pad)):
        if len(found) != 1:
            raise ConfigurationError(f"{key} must be one id, not {quote(list(found))}")
    if mask[0] in eos:
        raise ConfigurationError(f"mask_token_id and eos_token_id are both {mask[0]}")
    turns = [tokenizer.id_of(token) for token in END_OF_TURN_TOKENS]
    stop = dict.fromkeys((*eos, *(turn for turn in turns if turn is not None)))
    return SpecialIds(mask[0], eos[0], pad[0], tuple(stop))


def _first(
    key: str, config: Mapping[str, Any], generation: Mapping[str, Any], tokenizer_id: int | None
) -> tuple[int, ...]:
    for value in (config.get(key), generation.get(key), tokenizer_id):
        if value is None or value == []:
            continue
        values = value if isinstance(value, list) else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in values):
            raise ConfigurationError(f"{key} must be a token id, not {quote(value)}")
        return tuple(values)
    raise ConfigurationError(f"neither config.json nor generation_config.json nor the tokenizer has {key}")


def _check_ids(ids: SpecialIds, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Every id must have a row of logits."""
    for key, token_id in (("mask_token_id", ids.mask), ("eos_token_id", ids.eos), ("pad_token_id", ids.pad)):
        if token_id >= vocab_size:
            raise ConfigurationError(f"{key} = {token_id} is outside the model's vocabulary of {vocab_size}")
    if tokenizer.vocab_size > vocab_size:
        raise ConfigurationError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {vocab_size}: they do not belong together"
        )


def _default_max_tokens(generation: Mapping[str, Any], default: int, context_length: int) -> int:
    """The canvas of a request that names none, in tokens; half the context at most, so that a prompt fits too."""
    value = generation.get("max_new_tokens")
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(
            f"generation_config.json: max_new_tokens must be a positive integer, not {quote(value)}"
        )
    return min(value, max(1, context_length // 2))

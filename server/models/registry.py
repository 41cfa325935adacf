"""The families of diffusion models, and one row a published model. Adding a model touches nothing in the engine.

A checkpoint chooses its row by the `architectures` of its config.json. Its `auto_map`, which points to code, is never
read: the code is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from server.errors import ConfigurationError, quote
from server.models.base import DiffusionModel
from server.models.dream import DreamModel
from server.models.llada import LLaDAModel

DEFAULT_MAX_TOKENS = 128

# Tokens that end a turn in the chat templates of these families; those that a tokenizer has stop the text beside EOS.
END_OF_TURN_TOKENS = ("<|im_end|>", "<|eot_id|>")


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A published model. `max_tokens` is its default canvas."""

    id: str
    family: str
    max_tokens: int = DEFAULT_MAX_TOKENS


FAMILIES: tuple[type[DiffusionModel], ...] = (DreamModel, LLaDAModel)

KNOWN_MODELS = (
    KnownModel("Dream-org/Dream-v0-Instruct-7B", "dream"),
    KnownModel("Dream-org/Dream-v0-Base-7B", "dream"),
    KnownModel("Dream-org/Dream-Coder-v0-Instruct-7B", "dream"),
    KnownModel("apple/DiffuCoder-7B-Instruct", "dream"),
    KnownModel("GSAI-ML/LLaDA-8B-Instruct", "llada"),
    KnownModel("GSAI-ML/LLaDA-8B-Base", "llada"),
    KnownModel("GSAI-ML/LLaDA-1.5", "llada"),
)


def known_ids() -> str:
    """The published models' hub ids, for a message."""
    return ", ".join(model.id for model in KNOWN_MODELS)


def known_model(hub_id: str) -> KnownModel | None:
    """The row of a hub id, or None."""
    return next((model for model in KNOWN_MODELS if model.id == hub_id), None)


def family_of(config: Mapping[str, Any]) -> type[DiffusionModel]:
    """The family that config.json names. Raises ConfigurationError with the list of those that we have."""
    names = config.get("architectures")
    if isinstance(names, list) and len(names) == 1:
        for family in FAMILIES:
            if family.architecture == names[0]:
                return family
    known = ", ".join(family.architecture for family in FAMILIES)
    raise ConfigurationError(
        f"config.json: architectures = {quote(names)} is not a diffusion model that this server implements ({known}); "
        f"published ones: {known_ids()}"
    )

"""The families of diffusion models. Adding one touches nothing in the engine.

A checkpoint chooses its family by the `architectures` of its config.json. Its `auto_map`, which points to code, is
never read: the code is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.errors import ConfigurationError, quote
from server.models.a2d import A2DLlamaModel, A2DQwen2Model, A2DQwen3Model
from server.models.base import DiffusionModel
from server.models.dream import DreamModel
from server.models.llada import LLaDAModel
from server.models.sdar import SDARModel

FAMILIES: tuple[type[DiffusionModel], ...] = (
    DreamModel,
    LLaDAModel,
    A2DQwen3Model,
    A2DQwen2Model,
    A2DLlamaModel,
    SDARModel,
)

PUBLISHED = ", ".join(name for family in FAMILIES for name in family.published)
"""The published models' hub ids, for a message."""


def family_of(config: Mapping[str, Any]) -> type[DiffusionModel]:
    """The family that config.json names. Raises ConfigurationError with the list of those that we have."""
    names = config.get("architectures")
    for family in FAMILIES:
        if names == [family.architecture]:
            return family
    known = ", ".join(family.architecture for family in FAMILIES)
    raise ConfigurationError(
        f"config.json: architectures = {quote(names)} is not a diffusion model that this server implements ({known}); "
        f"published ones: {PUBLISHED}"
    )

"""The bundled default: a small diffusion LM and two reward models, trained by `python -m demo.train`.

The checkpoints under `models/` have the published layout and are loaded like any other; nothing in the engine knows
that they are special. See `models/README.md`, the model card.
"""

from __future__ import annotations

from pathlib import Path

MODELS = Path(__file__).resolve().parent / "models"
BUNDLED_NAME = "entrgi-demo-1.4m"
"""The id under which the bundled diffusion LM is served unless told otherwise."""


def bundled_model_path() -> Path:
    """The folder of the bundled diffusion LM."""
    return MODELS / "dlm"


def bundled_reward_models() -> dict[str, Path]:
    """The bundled reward models' folders by name. The first is the default."""
    return {name: MODELS / "rewards" / name for name in ("sentiment", "concrete")}

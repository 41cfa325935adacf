"""Which parts of a request trade exactness for time. The response names them, so that no reader has to guess.

Fewer `steps` than positions is not among them: it is the schedule itself, and the response has it as `steps`.
"""

from __future__ import annotations

from dataclasses import replace

from server.diffusion.schedule import plan
from server.types import DiffusionParams, GuidanceParams

WINDOW = ("start", "stop", "every")


def approximations(max_tokens: int, diffusion: DiffusionParams, guidance: GuidanceParams) -> tuple[str, ...]:
    """The algorithm where it is an adaptive one, then each of `guidance.start`, `guidance.stop` and `guidance.every`
    that leaves a step unguided. Of an adaptive run's steps nothing is known in advance: there a field counts that is
    not its default."""
    names = [diffusion.algorithm] if diffusion.adaptive else []
    return (*names, *(f"guidance.{field}" for field in WINDOW if _skips(field, max_tokens, diffusion, guidance)))


def _skips(field: str, max_tokens: int, diffusion: DiffusionParams, guidance: GuidanceParams) -> bool:
    if not guidance.uses_gradient or guidance.gradient_steps == 0:
        return False
    everywhere = GuidanceParams()
    value = getattr(guidance, field)
    if diffusion.adaptive or value == getattr(everywhere, field):
        return bool(value != getattr(everywhere, field))
    alone = replace(guidance, **{name: getattr(everywhere, name) for name in WINDOW if name != field})
    steps = plan(max_tokens, diffusion, alone)
    return any(not step.guided and (step.reveal > 0 or diffusion.algorithm == "origin") for step in steps)

"""The rows of the object `guidance`: a part of the table of request fields, of which `fields` has the others."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import BeforeValidator, Field

from server.api.rules import Only, Strict, Within, invalid
from server.api.values import Count, GuidingModel, MethodName, Share
from server.methods import SHORTHANDS, gradient_methods
from server.types import Confidence, GuidanceParams, Potential, ResampleBy, Resampling

_G, _R = GuidanceParams(), Resampling()

REWARD = Only("by", lambda: ["reward"])
GRADIENT = Only("method", gradient_methods, message="has no effect with method {value}, which uses no gradient")


class RewardTerm(Strict):
    """One reward model of a weighted sum."""

    model: GuidingModel
    """A loaded reward model, once in the sum"""
    weight: Annotated[float, Field(ge=-1000, le=1000)] = 1.0
    """Its factor in the objective"""


class Resample(Strict):
    """How the K trajectories of a prompt are resampled; there are at least two."""

    by: ResampleBy = _R.by
    """What makes a trajectory good: the reward of its text as it would be now, or how probable its tokens were to the
    diffusion model, which needs no reward model"""
    every: Count = _R.every
    """Steps between two times at which the trajectories meet"""
    strength: Annotated[float, Field(gt=0, le=100)] = _R.strength
    """The weight of a trajectory is exp(`strength` x what it has gained since it was last resampled)"""
    potential: Annotated[Potential, REWARD] = _R.potential
    """Whether the present reward counts, or the largest so far"""
    threshold: Annotated[float, Field(gt=0, le=1)] = _R.threshold
    """They are resampled where the effective sample size is below this share of K"""


class Guidance(Strict):
    """How rewards steer. `start` is less than `stop`; `reward_models` differ."""

    method: MethodName = _G.method
    """How rewards steer: one of `guidance_methods` in `/v1/models`"""
    reward_model: GuidingModel | None = None
    """A loaded reward model; none named: the first loaded, for a gradient method the first with a gradient"""
    reward_models: Annotated[
        Annotated[list[RewardTerm], Field(min_length=1, max_length=16), Within("terms")] | None,
        Only("reward_model", lambda: [None], message="and `guidance.reward_model` exclude each other"),
    ] = None
    """Several: the objective is the weighted sum of their rewards"""
    gradient_steps: Annotated[int, Field(ge=0, le=16), GRADIENT] = _G.gradient_steps
    """M, the Adam steps along the reward's gradient in a guided step"""
    eta: Annotated[float, Field(ge=0, le=10), GRADIENT] = _G.eta
    """Adam's step size"""
    confidence: Annotated[Confidence, GRADIENT] = _G.confidence
    """Whether positions are ranked by the distribution before guidance or after it; only with algorithms that rank by a
    distribution: `entropy`, `entropy_bound`, `threshold`"""
    start: Annotated[Share, GRADIENT] = _G.start
    """The share of the run before the first guided step"""
    stop: Annotated[Share, GRADIENT] = _G.stop
    """The share of the run from which on no step is guided"""
    every: Annotated[Count, GRADIENT] = _G.every
    """Of the steps between `start` and `stop`, one in so many is guided"""
    resample: Resample | None = None
    """Copies good trajectories over bad ones while they run, with any method: an object, `{}` for its defaults"""


def _spelled_out(value: object) -> object:
    """`"entrgi"` is short for `{"method": "entrgi"}`, and `SHORTHANDS` has others."""
    if not isinstance(value, str | dict):
        raise invalid("must be a method's name or an object")
    return SHORTHANDS.get(value, {"method": value}) if isinstance(value, str) else value


_Shorthand: TypeAlias = Annotated[str, Field(json_schema_extra={"enum": [*SHORTHANDS]})]
GuidanceForms: TypeAlias = Annotated[
    Guidance, BeforeValidator(_spelled_out, json_schema_input_type=MethodName | _Shorthand | Guidance)
]

"""The `guidance` and `diffusion` objects of a request as inner parameters.

A field that would have no effect is refused: with `none` and `bon` there is no gradient to set, and an algorithm's own
number means nothing to another algorithm.
"""

from __future__ import annotations

from typing import TypeVar

from server.api.rules import GRADIENT_FIELDS
from server.api.schemas import LEAST_TEMPERATURE, Diffusion, Guidance
from server.errors import InvalidRequest, quote
from server.types import ADAPTIVE_ALGORITHMS, DiffusionParams, EngineInfo, GuidanceParams, WeightedReward

Value = TypeVar("Value")

OWN_FIELD = {"entropy_bound": "entropy_bound", "threshold": "confidence_threshold"}


def guidance_params(guidance: Guidance | None, info: EngineInfo) -> GuidanceParams:
    """Guidance with defaults filled in and reward models checked. Raises InvalidRequest."""
    if guidance is None:
        return GuidanceParams()
    method = guidance.method or "none"
    if method != "none" and not info.reward_models:
        raise InvalidRequest(f"`guidance` {method} needs a reward model, and none is loaded", "guidance")
    given = guidance.given()
    params = GuidanceParams(method)
    if not params.uses_gradient:
        for field in GRADIENT_FIELDS:
            if field in given:
                raise InvalidRequest(
                    f"`guidance.{field}` has no effect with method {method}, which uses no gradient",
                    f"guidance.{field}",
                )
    params = GuidanceParams(
        method=method,
        reward_models=_reward_models(guidance, method, info),
        gradient_steps=_or(guidance.gradient_steps, params.gradient_steps),
        eta=_or(guidance.eta, params.eta),
        confidence=guidance.confidence or params.confidence,
        start=_or(guidance.start, params.start),
        stop=_or(guidance.stop, params.stop),
        every=_or(guidance.every, params.every),
    )
    if params.start >= params.stop:
        field = "guidance.stop" if "stop" in given else "guidance.start"
        raise InvalidRequest("`guidance.start` must be less than `guidance.stop`", field)
    return params


def _reward_models(guidance: Guidance, method: str, info: EngineInfo) -> tuple[WeightedReward, ...]:
    loaded = [reward.id for reward in info.reward_models]
    if guidance.reward_models is not None:
        if guidance.reward_model is not None:
            raise InvalidRequest(
                "`guidance.reward_model` and `guidance.reward_models` exclude each other", "guidance.reward_models"
            )
        names = [term.model for term in guidance.reward_models]
        for index, name in enumerate(names):
            _check_loaded(name, loaded, f"guidance.reward_models.{index}.model")
            if name in names[:index]:
                raise InvalidRequest(
                    f"reward model {quote(name)} is named twice", f"guidance.reward_models.{index}.model"
                )
        return tuple(WeightedReward(term.model, _or(term.weight, 1.0)) for term in guidance.reward_models)
    if guidance.reward_model is not None:
        _check_loaded(guidance.reward_model, loaded, "guidance.reward_model")
        return (WeightedReward(guidance.reward_model),)
    return () if method == "none" else (WeightedReward(loaded[0]),)


def _check_loaded(name: str, loaded: list[str], param: str) -> None:
    if name not in loaded:
        names = ", ".join(loaded) or "none"
        raise InvalidRequest(f"`{param}`: {quote(name)} is not loaded; loaded: {names}", param)


def diffusion_params(
    diffusion: Diffusion | None, max_tokens: int, context_length: int, asked: Guidance | None
) -> DiffusionParams:
    """Diffusion parameters with defaults (steps = max_tokens). `asked` is the guidance as it was sent. Raises
    InvalidRequest."""
    sent = diffusion or Diffusion()
    given = sent.given()
    algorithm = sent.algorithm or "entropy"
    for owner, field in OWN_FIELD.items():
        if field in given and algorithm != owner:
            raise InvalidRequest(f"`diffusion.{field}` has no effect with algorithm {algorithm}", f"diffusion.{field}")
    if algorithm == "origin":
        # It reveals each position by chance: nothing is ranked, and no number of positions is scheduled.
        _refuse("algorithm_temperature", bool(sent.algorithm_temperature), algorithm)
        _refuse("deprioritize_eos", sent.deprioritize_eos is True, algorithm)
        _refuse("schedule", sent.schedule == "even", algorithm)
    if algorithm in ADAPTIVE_ALGORITHMS:
        # Their rule is about the most confident positions; a ranking by chance has none.
        _refuse("algorithm_temperature", bool(sent.algorithm_temperature), algorithm)
    if asked is not None and asked.confidence is not None and algorithm not in ("entropy", *ADAPTIVE_ALGORITHMS):
        raise InvalidRequest(f"`guidance.confidence` has no effect with algorithm {algorithm}", "guidance.confidence")
    if sent.steps is not None and sent.steps > context_length:
        raise InvalidRequest(
            f"`diffusion.steps` is {sent.steps}; the limit is the model's context, {context_length}",
            "diffusion.steps",
        )
    if sent.block_length is not None and sent.block_length > max_tokens:
        raise InvalidRequest(
            f"`diffusion.block_length` is {sent.block_length}, more than the {max_tokens} tokens to fill",
            "diffusion.block_length",
        )
    if sent.algorithm_temperature and sent.algorithm_temperature < LEAST_TEMPERATURE:
        raise InvalidRequest(
            f"`diffusion.algorithm_temperature` must be 0 or at least {LEAST_TEMPERATURE:g}",
            "diffusion.algorithm_temperature",
        )
    defaults = DiffusionParams(max_tokens)
    return DiffusionParams(
        steps=_or(sent.steps, max_tokens),
        algorithm=algorithm,
        algorithm_temperature=sent.algorithm_temperature or None,
        deprioritize_eos=_or(sent.deprioritize_eos, algorithm != "origin"),
        block_length=sent.block_length,
        schedule=sent.schedule or "linear",
        cfg_scale=_or(sent.cfg_scale, 0.0),
        entropy_bound=_or(sent.entropy_bound, defaults.entropy_bound),
        confidence_threshold=_or(sent.confidence_threshold, defaults.confidence_threshold),
    )


def _refuse(field: str, asked: bool, algorithm: str) -> None:
    if asked:
        raise InvalidRequest(f"`diffusion.{field}` has no effect with algorithm {algorithm}", f"diffusion.{field}")


def _or(value: Value | None, default: Value) -> Value:
    return default if value is None else value

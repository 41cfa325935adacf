"""What a request may ask for, typed. Left-out fields are left out of the body too: the server's defaults hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict

from .errors import ClientError

SMC = "smc"
Prompt = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]


class Message(TypedDict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


Query = str | Sequence[Message]
Queries = Query | Sequence[str] | Sequence[Sequence[Message]]


@dataclass(frozen=True, slots=True)
class WeightedReward:
    """A reward model and its weight in the objective."""

    model: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Resample:
    """How trajectories are resampled while they run: after every `every` steps good ones are copied over bad ones, if
    the effective sample size is below `threshold` of their number. Each weighs exp(`strength` x its reward)."""

    by: Literal["reward", "confidence"] | None = None
    every: int | None = None
    strength: float | None = None
    potential: Literal["difference", "max"] | None = None
    threshold: float | None = None


@dataclass(frozen=True, slots=True)
class Guidance:
    """How rewards steer the generation (arXiv 2602.05000): `method` is one of the server's, which `/v1/models` lists;
    `gradient_steps` is the paper's M, `eta` Adam's step size.
    Only the steps in [`start`, `stop`) of the run are guided, every `every`-th of them. In a request "smc" is short for
    `Guidance("bon", resample=Resample())`."""

    method: str
    reward_model: str | None = None
    reward_models: tuple[WeightedReward, ...] | None = None
    gradient_steps: int | None = None
    eta: float | None = None
    confidence: Literal["base", "guided"] | None = None
    start: float | None = None
    stop: float | None = None
    every: int | None = None
    resample: Resample | None = None


@dataclass(frozen=True, slots=True)
class Diffusion:
    """How the canvas is filled. `entropy_bound` (nats) belongs to the algorithm of its name, `confidence_threshold` to
    `threshold`; both reveal as many tokens a step as their rule allows."""

    steps: int | None = None
    algorithm: Literal["entropy", "maskgit_plus", "topk_margin", "origin", "entropy_bound", "threshold"] | None = None
    algorithm_temperature: float | None = None
    entropy_bound: float | None = None
    confidence_threshold: float | None = None
    deprioritize_eos: bool | None = None
    block_length: int | None = None
    schedule: Literal["linear", "even"] | None = None
    cfg_scale: float | None = None


def guidance_of(word: str, resample: Resample | None = None, **fields: Any) -> Guidance:
    """The guidance that a command names by a word: a method, `METHOD+smc` for one whose trajectories are resampled, or
    `smc`, which is `bon+smc`. With `resample` any method resamples. Raises ClientError for anything else behind +."""
    method, plus, rule = ("bon+smc" if word == SMC else word).partition("+")
    if plus and rule != SMC:
        raise ClientError(f"{word!r}: after a method, only +{SMC} is wanted")
    return Guidance(method, resample=resample or (Resample() if plus else None), **fields)


class Options(TypedDict, total=False):
    """The fields that completions and chats share. `timeout` is
    the server's deadline for the request in seconds; `extra` is merged into the body as it stands."""

    model: str
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int | Sequence[int]
    n: int
    best_of: int
    stop: str | Sequence[str]
    guidance: str | Guidance
    diffusion: Diffusion
    return_token_ids: bool
    return_step_map: bool
    ignore_eos: bool
    trace: bool
    timeout: float
    user: str
    extra: Mapping[str, Any]


def request_body(options: Options, **own: Any) -> dict[str, Any]:
    """The JSON body for `options` and the endpoint's own fields; None values are left out."""
    merged: dict[str, Any] = {**options, **own}
    extra = merged.pop("extra", None) or {}
    return {key: _plain(value) for key, value in {**merged, **extra}.items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, Guidance | Resample | Diffusion | WeightedReward):
        pairs = ((f.name, getattr(value, f.name)) for f in fields(value))
        return {name: _plain(item) for name, item in pairs if item is not None}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value

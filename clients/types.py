"""What the server answers, as frozen dataclasses. Fields that the server may add later are ignored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import msgspec

from .errors import UnexpectedResponse

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens read and generated. `completion_tokens_details["trajectory_tokens"]` counts all `best_of` trajectories."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    completion_tokens_details: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class StepTrace:
    """One denoising step of one trajectory; entropy in nats, `mean_w` None on unguided steps; the last three only where
    trajectories met after the step."""

    step: int
    time: float
    masked: int
    revealed: int
    mean_entropy: float | None = None
    mean_w: float | None = None
    reward_before: float | None = None
    reward_after: float | None = None
    reward_estimate: float | None = None
    log_weight: float | None = None
    ancestor: int | None = None


@dataclass(frozen=True, slots=True)
class GuidanceReport:
    """How the answer came about. `rewards[p][k]` is prompt p's final reward of trajectory k, before the choice of the
    n best; `approximations` names what in the request traded exactness for time; `queue_ms` and `generation_ms` are
    milliseconds. With resampling, `resampled[p]` has the steps taken and each trajectory's ancestor whenever some were
    copied, and `weights[p]` are the final ones. Rewards `without_gradient` chose and resampled, but did not steer."""

    method: str
    seed: int | list[int]
    steps: int
    model_calls: int
    reward_calls: int
    queue_ms: float
    generation_ms: float
    reward_models: list[str] = field(default_factory=list)
    rewards: list[list[float | None]] | None = None
    approximations: list[str] = field(default_factory=list)
    rewards_by_model: dict[str, list[list[float | None]]] | None = None
    without_gradient: list[str] = field(default_factory=list)
    resampled: list[list[tuple[int, list[int]]]] | None = None
    weights: list[list[float] | None] | None = None
    model_calls_total: int | None = None
    reward_calls_total: int | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """One text. `trajectory` is its index in `GuidanceReport.rewards` and in the trace; `reward` is None where no
    reward model took part; `token_ids` came with `return_token_ids`, `step_map` with `return_step_map`."""

    index: int
    text: str
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    reward: float | None = None
    rewards: dict[str, float | None] | None = None
    token_ids: list[int] | None = None
    step_map: list[int | None] | None = None
    trajectory: int | None = None


@dataclass(frozen=True, slots=True)
class AssistantMessage:
    """The message of a chat choice."""

    content: str | None = None
    role: str = "assistant"


@dataclass(frozen=True, slots=True)
class ChatChoice:
    """One answer of a chat; fields as in `Choice`."""

    index: int
    message: AssistantMessage
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    reward: float | None = None
    rewards: dict[str, float | None] | None = None
    token_ids: list[int] | None = None
    step_map: list[int | None] | None = None
    trajectory: int | None = None

    @property
    def text(self) -> str:
        """The message's text."""
        return self.message.content or ""


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer of `/v1/completions`: for each prompt its n best texts, best first."""

    id: str
    model: str
    choices: list[Choice]
    created: int = 0
    usage: Usage = Usage()
    guidance: GuidanceReport | None = None
    trace: list[list[list[StepTrace]]] | None = None


@dataclass(frozen=True, slots=True)
class ChatCompletion:
    """The answer of `/v1/chat/completions`: the n best messages, best first."""

    id: str
    model: str
    choices: list[ChatChoice]
    created: int = 0
    usage: Usage = Usage()
    guidance: GuidanceReport | None = None
    trace: list[list[list[StepTrace]]] | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """A served diffusion or reward model, or a scorer; `details` is the whole entry of `/v1/models`."""

    id: str
    details: dict[str, Any]

    @property
    def kind(self) -> Literal["diffusion", "reward", "scorer"]:
        """What the model does: generate, reward with a gradient, or without."""
        kind: Literal["diffusion", "reward", "scorer"] = self.details.get("type", "diffusion")
        return kind


@dataclass(frozen=True, slots=True)
class Score:
    """The reward of one pair."""

    index: int
    score: float


@dataclass(frozen=True, slots=True)
class Scores:
    """The answer of `/v1/score`, in the order of the pairs."""

    model: str
    data: list[Score]
    usage: Usage = Usage()


@dataclass(frozen=True, slots=True)
class RerankDocument:
    """A document as it was sent."""

    text: str


@dataclass(frozen=True, slots=True)
class RerankResult:
    """One document, by its index in the request, with its reward."""

    index: int
    relevance_score: float
    document: RerankDocument | None = None


@dataclass(frozen=True, slots=True)
class Rerank:
    """The answer of `/v1/rerank`, best first."""

    model: str
    results: list[RerankResult]
    usage: Usage = Usage()


@dataclass(frozen=True, slots=True)
class Tokenized:
    """The answer of `/tokenize`."""

    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None = None


def decode(body: bytes, kind: type[T]) -> T:
    """`body` (JSON) as `kind`; raises UnexpectedResponse where it does not have that shape."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:  # ValidationError is among them
        raise UnexpectedResponse(f"not a {kind.__name__}: {error}") from error

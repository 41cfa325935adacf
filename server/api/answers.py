"""Response bodies and chunks of streams: their shapes, which the OpenAPI document shows, and how results fill them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from server.api.convert import Plan
from server.diffusion.schedule import plan as schedule
from server.types import (
    DiffusionParams,
    FinishReason,
    GuidanceParams,
    JobResult,
    StepTrace,
    TrajectoryResult,
)

WINDOW = ("start", "stop", "every")


class Answer(BaseModel):
    """Base: what is set is sent, null included; what is not set is absent."""

    model_config = ConfigDict(protected_namespaces=(), use_attribute_docstrings=True)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready data."""
        return self.model_dump(mode="json", exclude_unset=True)


class Usage(Answer):
    """Tokens up to the end of each text; `trajectory_tokens` are those of all `best_of` trajectories."""

    prompt_tokens: int
    """Tokens of all prompts"""
    completion_tokens: int
    """Tokens of the texts that came back"""
    total_tokens: int
    """Both together"""
    completion_tokens_details: dict[Literal["trajectory_tokens"], int]
    """`trajectory_tokens`: tokens of all `best_of` trajectories"""


class GuidanceReport(Answer):
    """What was done, and how every trajectory came out, by prompt."""

    method: str
    """How rewards steered"""
    reward_models: list[str]
    """The reward models that took part"""
    seed: int | list[int]
    """The request's own, or the one that was drawn for it"""
    rewards: list[list[float | None]]
    """`rewards[prompt][trajectory]`: the final rewards, before the choice of the n best"""
    rewards_by_model: dict[str, list[list[float | None]]] = {}
    """With several reward models: the same by model, unweighted"""
    without_gradient: list[str] = []
    """Where there are such: those that chose and resampled only, because they have no gradient"""
    resampled: list[list[tuple[int, list[int]]]] = []
    """With `guidance.resample`: by prompt, for each time that trajectories were copied, the steps taken until then and
    each trajectory's ancestor"""
    weights: list[list[float] | None] = []
    """With `guidance.resample`: by prompt the normalised weights of its trajectories; null where a reward is missing"""
    approximations: list[str]
    """What in the request trades exactness for time"""
    steps: int
    """Denoising steps as asked for; with an adaptive algorithm those of the longest trajectory"""
    model_calls: int
    """Passes of the diffusion model over the canvas of the trajectory with the most"""
    reward_calls: int
    """Passes of reward models over that canvas during the steps"""
    model_calls_total: int
    """The former for all trajectories of all prompts together"""
    reward_calls_total: int
    """The same of reward models, final scores included"""
    queue_ms: float
    """Milliseconds before the first step, of the prompt that waited longest"""
    generation_ms: float
    """Milliseconds from the first step to the last, of the prompt that took longest"""


class Outcome(Answer):
    """What one answer has beside its text that is not OpenAI's."""

    trajectory: int = 0
    """Which of its prompt's trajectories it is, in `guidance.rewards` and in `trace`"""
    stop_reason: str | None = None
    """The stop string that ended the text, or `deadline`"""
    reward: float | None = None
    """The final reward; null where no reward model took part, or one did not answer in time"""
    rewards: dict[str, float | None] = {}
    """With several reward models: the final reward under each"""
    token_ids: list[int] = []
    """On request: the L canvas tokens, special ones included"""
    step_map: list[int | None] = []
    """On request: the step at which each of these was revealed, null where it never was"""


class Choice(Outcome):
    """What all kinds of choice share. In a stream each holds a piece of one answer, and the last of them what the whole
    answer has beside its text."""

    index: int
    """Its place: answer i to prompt p has p * n + i"""
    finish_reason: FinishReason | None
    """`stop`: the end of the text or a stop string; `length`: the end of the canvas, or the deadline"""
    logprobs: None


class CompletionChoice(Choice):
    """One answer to a prompt, or text to append to it."""

    text: str


class AssistantMessage(Answer):
    """The answer as a turn."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Choice):
    """One answer to a conversation."""

    message: AssistantMessage
    """The turn"""


class Head(Answer):
    """What responses and chunks share. `trace` is by prompt, then trajectory, then step."""

    id: str
    created: int
    model: str
    trace: list[list[list[StepTrace]]] = []


class CompletionResponse(Head):
    """Answer to `POST /v1/completions`."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage
    guidance: GuidanceReport


class ChatCompletionResponse(Head):
    """Answer to `POST /v1/chat/completions`."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    guidance: GuidanceReport


class Delta(Answer):
    """What to append to a turn."""

    role: Literal["assistant"] = "assistant"
    content: str = ""


class ChatChunkChoice(Choice):
    """Part of a turn."""

    delta: Delta


class CanvasReport(Answer):
    """One trajectory after a denoising step: token texts (null where masked) and entropies in nats."""

    prompt: int
    """Which prompt of the request, from 0"""
    trajectory: int
    """Which of its trajectories, from 0"""
    step: int
    """Which step it was, from 0"""
    tokens: list[str | None]
    """The text of each position, null while it is masked"""
    entropy: list[float | None] | None
    """Nats of each position, null where it is revealed"""
    reward: float | None
    """The reward of the current estimate, where the step was guided"""
    ancestor: int | None
    """The trajectory whose copy took this one's place last; null where none did"""


class Chunk(Head):
    """What both kinds of chunk share."""

    usage: Usage | None = None
    guidance: GuidanceReport | None = None
    canvas: CanvasReport | None = None


class CompletionChunk(Chunk):
    """A chunk of `POST /v1/completions`."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class ChatCompletionChunk(Chunk):
    """A chunk of `POST /v1/chat/completions`."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]


Data = dict[str, Any]
"""A JSON object on its way out; the classes above say what it holds."""


def chosen(result: JobResult) -> list[TrajectoryResult]:
    """The n answers of a prompt, best first (in order for `none`)."""
    return [result.trajectories[index] for index in result.chosen]


def counted(prompt_tokens: int, completion_tokens: int, trajectory_tokens: int) -> Data:
    """A `Usage` from its three counts."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens_details": {"trajectory_tokens": trajectory_tokens},
    }


def usage(plan: Plan, results: Sequence[JobResult]) -> Data:
    """The `Usage` of a whole request."""
    completion = sum(answer.completion_tokens for result in results for answer in chosen(result))
    every = sum(trajectory.completion_tokens for result in results for trajectory in result.trajectories)
    return counted(plan.prompt_tokens, completion, every)


def report(plan: Plan, results: Sequence[JobResult]) -> Data:
    """What concerns the whole request: its `GuidanceReport`, and the trace if there is one. Prompts run side by side,
    so times are the largest of them, and so are the calls of one trajectory."""
    job, names = plan.jobs[0], [weighted.model for weighted in plan.guidance.rewards]
    every = [trajectory for result in results for trajectory in result.trajectories]
    guidance: Data = {
        "method": plan.guidance.method,
        "reward_models": names,
        "seed": plan.sampling.seed if plan.asked.seed is None else plan.asked.seed,
        "rewards": [[trajectory.reward for trajectory in result.trajectories] for result in results],
        "approximations": list(approximations(plan.sampling.max_tokens, job.diffusion, plan.guidance, job.lead)),
        "steps": max(result.steps for result in results),
        "model_calls": max(result.model_calls for result in results),
        "reward_calls": max(result.reward_calls for result in results),
        "model_calls_total": sum(trajectory.model_calls for trajectory in every),
        "reward_calls_total": sum(
            trajectory.reward_calls + sum(reward is not None for reward in trajectory.rewards.values())
            for trajectory in every
        ),
        "queue_ms": round(max(result.queue_ms for result in results), 3),
        "generation_ms": round(max(result.generation_ms for result in results), 3),
    }
    if len(names) > 1:
        guidance["rewards_by_model"] = {
            name: [[trajectory.rewards[name] for trajectory in result.trajectories] for result in results]
            for name in names
        }
    if plan.guidance.scorers:
        guidance["without_gradient"] = [weighted.model for weighted in plan.guidance.scorers]
    if plan.guidance.resample is not None:
        guidance["resampled"] = [result.resampled for result in results]
        guidance["weights"] = [result.weights for result in results]
    if not plan.asked.trace:
        return {"guidance": guidance}
    trace = [[[asdict(step) for step in each.trace] for each in result.trajectories] for result in results]
    return {"guidance": guidance, "trace": trace}


def choice(plan: Plan, index: int, answer: TrajectoryResult) -> Data:
    """The fields of a finished choice other than its text."""
    fields: Data = {
        "index": index,
        "trajectory": answer.index,
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
        "logprobs": None,
        "reward": answer.reward,
    }
    if len(plan.guidance.rewards) > 1:
        fields["rewards"] = answer.rewards
    if plan.asked.return_token_ids:
        fields["token_ids"] = list(answer.token_ids)
    if plan.asked.return_step_map:
        fields["step_map"] = [None if step < 0 else step for step in answer.step_map]
    return fields


def head(plan: Plan, kind: str, choices: list[Data]) -> Data:
    """A response or a chunk: what all of them share."""
    return {"id": plan.id, "object": kind, "created": plan.created, "model": plan.model, "choices": choices}


def response(plan: Plan, results: Sequence[JobResult]) -> Data:
    """The whole answer. Choice i of prompt p has index p * n + i."""
    choices = []
    for index, answer in enumerate(answer for result in results for answer in chosen(result)):
        turn = {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
        choices.append(choice(plan, index, answer) | (turn if plan.chat else {"text": answer.text}))
    kind = "chat.completion" if plan.chat else "text_completion"
    return head(plan, kind, choices) | {"usage": usage(plan, results)} | report(plan, results)


def approximations(
    max_tokens: int, diffusion: DiffusionParams, guidance: GuidanceParams, lead: int = 0
) -> tuple[str, ...]:
    """The algorithm where it is an adaptive one, then each of `guidance.start`, `guidance.stop` and `guidance.every`
    that leaves a step unguided. Of an adaptive run's steps nothing is known in advance: there a field counts that is
    not its default."""
    names = [diffusion.algorithm] if diffusion.adaptive else []
    return (*names, *(f"guidance.{field}" for field in WINDOW if _skips(field, max_tokens, diffusion, guidance, lead)))


def _skips(field: str, max_tokens: int, diffusion: DiffusionParams, guidance: GuidanceParams, lead: int) -> bool:
    everywhere = GuidanceParams()
    if not guidance.inner_steps or getattr(guidance, field) == getattr(everywhere, field):
        return False
    if diffusion.adaptive:
        return True
    alone = replace(guidance, **{name: getattr(everywhere, name) for name in WINDOW if name != field})
    steps = schedule(max_tokens, diffusion, alone, lead)
    return any(not step.guided and (step.reveal > 0 or diffusion.algorithm == "origin") for step in steps)

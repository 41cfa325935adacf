"""What came back, read once: the texts with their rewards, what they cost, and the measures of a setting."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, TypeVar

import msgspec

from ..errors import ClientError, UnexpectedResponse
from ..types import ChatCompletion, Completion, Model
from .journal import Journal, Record
from .sweep import UNGUIDED, Asked, Setting

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Cost:
    """What a request took, all trajectories together. `flops` are those of networks, counted as `flops_of` says."""

    model_calls: int
    reward_calls: int
    flops: float | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Answer:
    """One request's K texts: best first, those of method `none` as they were drawn. `rewards` are theirs, under the
    reward model that the request names; `tokens` the mean of them. `values` holds what else was measured of each text,
    by measure."""

    asked: Asked
    texts: tuple[str, ...]
    rewards: tuple[float, ...]
    tokens: float
    cost: Cost
    completion: Completion | ChatCompletion
    values: dict[str, list[float]] = field(default_factory=dict)


def completion_of(record: Record) -> Completion | ChatCompletion:
    """The answer in a record of a generation. Raises UnexpectedResponse where it has another shape."""
    if record.request.url.endswith("/chat/completions"):
        return body_of(record, ChatCompletion)
    return body_of(record, Completion)


def body_of(record: Record, kind: type[T]) -> T:
    """What a record's answer says. Raises UnexpectedResponse where it has another shape."""
    try:
        return msgspec.convert(record.response.body, kind)
    except msgspec.ValidationError as error:
        raise unexpected(record, error) from None


def unexpected(record: Record, why: object) -> UnexpectedResponse:
    """The error for an answer that cannot be used, which says how it is asked for again: a journal keeps every one."""
    again = f"without the line of {record.custom_id} in the journal it is asked for again"
    return UnexpectedResponse(f"{record.server}{record.request.url}: {why}; {again}")


def found_in(journal: Journal, wanted: set[str]) -> dict[str, Record]:
    """The journal's records of these ids that have a result. Raises ClientError where all were refused."""
    records = {record.custom_id: record for record in journal.records() if record.custom_id in wanted}
    good = {name: record for name, record in records.items() if record.refusal is None}
    if records and not good:
        raise ClientError(
            f"all {len(records)} requests were refused, the first with {next(iter(records.values())).refusal}"
        )
    return good


def read(asked: Sequence[Asked], records: Mapping[str, Record], served: Sequence[Model]) -> list[Answer]:
    """The answers to those of `asked` that have one."""
    by_name = {model.id: model for model in served}
    diffusion = next(model for model in served if model.kind == "diffusion")
    answers = []
    for each in asked:
        if (record := records.get(each.request.custom_id)) is not None:
            completion = completion_of(record)
            report = completion.guidance
            rewards = [choice.reward for choice in completion.choices if choice.reward is not None]
            if report is None:
                raise UnexpectedResponse(f"{record.server} sent no rewards: it is no entrgi server, or an older one")
            if len(rewards) < len(completion.choices):  # a scorer was too late: it counts as unanswered
                continue
            details = completion.usage.completion_tokens_details or {}
            cost = Cost(
                report.model_calls_total or 0,
                report.reward_calls_total or 0,
                flops_of(completion, each.setting, diffusion.details, by_name[each.setting.reward_model].details),
                record.seconds,
            )
            texts = tuple(choice.text for choice in completion.choices)
            tokens = details.get("trajectory_tokens", completion.usage.completion_tokens) / len(texts)
            answers.append(Answer(each, texts, tuple(rewards), tokens, cost, completion))
    return answers


def flops_of(
    completion: Completion | ChatCompletion, setting: Setting, diffusion: Mapping[str, Any], reward: Mapping[str, Any]
) -> float | None:
    """Floating-point operations of a request's networks: two for each parameter and token that a pass reads, and, where
    the method takes gradients, as many again for the way back through the reward model. Each pass is taken to read the
    prompt and the whole canvas; the server's cached prefixes make the reward model's cheaper, and meetings of
    trajectories need no way back, so guidance is charged too much rather than too little. Counted are all trajectories,
    and the final scores; neither attention nor the passes over the vocabulary, nor what a scorer outside computes."""
    report = completion.guidance
    size = reward.get("parameters") or (0 if reward.get("type") == "scorer" else None)
    if report is None or not diffusion.get("parameters") or size is None:
        return None
    tokens = completion.usage.prompt_tokens + setting.fields.get("max_tokens", diffusion["defaults"]["max_tokens"])
    read = report.reward_calls_total or 0
    back = 0 if setting.fields["guidance"]["method"] in UNGUIDED else max(read - setting.best_of, 0)
    passes = diffusion["parameters"] * (report.model_calls_total or 0) + size * (read + back)
    return float(2 * tokens * passes)


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct-n (Li et al., 2016): different n-grams of words over all of them, in the texts together; 0 where there
    are none."""
    words = [text.split() for text in texts]
    grams = [tuple(line[at : at + n]) for line in words for at in range(len(line) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


MEASURES: dict[str, Callable[[Answer], float | None]] = {
    "Top@1": lambda answer: answer.rewards[0],
    "Avg@N": lambda answer: fmean(answer.rewards),
    "distinct-1": lambda answer: distinct(answer.texts, 1),
    "distinct-2": lambda answer: distinct(answer.texts, 2),
    "words": lambda answer: len(answer.texts[0].split()),
    "tokens": lambda answer: answer.tokens,
    "model calls": lambda answer: answer.cost.model_calls,
    "reward calls": lambda answer: answer.cost.reward_calls,
    "GFLOPs": lambda answer: answer.cost.flops and answer.cost.flops / 1e9,
    "seconds": lambda answer: answer.cost.seconds,
}
"""What is measured of every answer. Top@1 is the reward of the text that a user gets: the best, with method `none` the
first."""


def by_prompt(answers: Sequence[Answer], setting: str) -> dict[str, dict[str, float]]:
    """A setting's measures, by measure and prompt id: the mean over the seeds of a prompt, which is the unit of all
    statistics."""
    seen: dict[str, dict[str, list[float]]] = {}
    for answer in answers:
        if answer.asked.setting.name != setting:
            continue
        row = {name: value for name, measure in MEASURES.items() if (value := measure(answer)) is not None}
        for name, values in answer.values.items():
            row |= {f"{name} Top@1": values[0]} | ({f"{name} Avg@N": fmean(values)} if len(values) > 1 else {})
        for name, value in row.items():
            seen.setdefault(name, {}).setdefault(answer.asked.prompt.id, []).append(value)
    return {name: {prompt: fmean(values) for prompt, values in rows.items()} for name, rows in seen.items()}

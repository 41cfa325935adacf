"""The comparison of guidance methods: rewards, judge and fluency side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import httpx
from tqdm import tqdm

from clients.quality.intervals import Interval
from clients.quality.judges import SmolLM, Vader
from clients.quality.prompts import Prompt
from clients.quality.requests import Answer, ask


@dataclass(frozen=True)
class Settings:
    """What is asked of the server. None leaves the server's default."""

    trajectories: int = 4
    max_tokens: int | None = None
    steps: int | None = None
    gradient_steps: int | None = None
    eta: float | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 1000
    concurrency: int = 4

    def options(self, method: str, reward_model: str) -> dict[str, Any]:
        """The body of a request but for the prompt. `none` returns all trajectories, in order, scored."""
        guidance: dict[str, Any] = {"method": method, "reward_model": reward_model}
        if method not in ("none", "bon"):
            guidance |= _given(gradient_steps=self.gradient_steps, eta=self.eta)
        options = _given(max_tokens=self.max_tokens, temperature=self.temperature, top_p=self.top_p)
        if self.steps is not None:
            options["diffusion"] = {"steps": self.steps}
        count = {"n": self.trajectories} if method == "none" else {"n": 1, "best_of": self.trajectories}
        return {**options, **count, "guidance": guidance}


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


@dataclass(frozen=True)
class Row:
    """One method under one reward model. Everything but `average` is of the answer that a user gets."""

    method: str
    reward_model: str
    top: Interval
    average: Interval
    judge: Interval
    nll: Interval
    words: Interval
    empty: int
    top_values: tuple[float, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """All rows, and the paired differences of Top@1 between EntRGi and best of N, by reward model."""

    rows: tuple[Row, ...]
    differences: dict[str, Interval]


def row_of(method: str, reward_model: str, answers: Sequence[Answer], vader: Vader, smol: SmolLM) -> Row:
    """Judge the answers of one method."""
    texts = tuple(answer.texts[0] for answer in answers)
    top = tuple(_reward(answer) for answer in answers)
    spoken = [(answer.prompt.text, text) for answer, text in zip(answers, texts, strict=True) if text.strip()]
    return Row(
        method,
        reward_model,
        Interval.of(top),
        Interval.of([fmean(answer.trajectory_rewards) for answer in answers]),
        Interval.of([vader.score(text) for text in texts]),
        Interval.of(smol.nlls(spoken)) if spoken else Interval(float("nan"), float("nan")),
        Interval.of([float(len(text.split())) for text in texts]),
        len(texts) - len(spoken),
        top,
        texts,
    )


def _reward(answer: Answer) -> float:
    reward = answer.choice_rewards[0]
    if reward is None:
        raise ValueError(f"the server sent no reward for {answer.prompt.text!r}")
    return reward


async def compare(
    client: httpx.AsyncClient,
    prompts: Sequence[Prompt],
    reward_models: Sequence[str],
    methods: Sequence[str],
    settings: Settings,
) -> Comparison:
    """Ask everything first, so that the judges do not take the server's cores; then judge."""
    vader = Vader()
    answers: dict[tuple[str, str], list[Answer]] = {}
    pairs = [(method, reward) for reward in reward_models for method in methods]
    for method, reward in (bar := tqdm(pairs, unit="run")):
        bar.set_postfix_str(f"{reward} {method}")
        options = settings.options(method, reward)
        answers[method, reward] = await ask(
            client, prompts, options, seed=settings.seed, concurrency=settings.concurrency
        )
    smol = SmolLM()
    rows = [row_of(method, reward, found, vader, smol) for (method, reward), found in answers.items()]
    return Comparison(tuple(rows), paired_differences(rows))


def paired_differences(rows: Sequence[Row]) -> dict[str, Interval]:
    """Top@1 of entrgi minus that of bon, prompt by prompt."""
    by_name = {(row.method, row.reward_model): row for row in rows}
    found: dict[str, Interval] = {}
    for reward in dict.fromkeys(row.reward_model for row in rows):
        guided, plain = by_name.get(("entrgi", reward)), by_name.get(("bon", reward))
        if guided is not None and plain is not None:
            pairs = zip(guided.top_values, plain.top_values, strict=True)
            found[reward] = Interval.of([a - b for a, b in pairs])
    return found

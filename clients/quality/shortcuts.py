"""What the options that are not exact cost and gain: each against exact EntRGi on the same prompts and seeds.

Costs are paired by prompt: the change of the rewards and of the judge's likelihood. Gains are counted (denoising steps,
model calls, reward calls of the longest trajectory of a request) and timed. The prompts go in rounds; in each round
every option has its turn, in another order, and its time is compared with the exact run's of the same round, so that
whatever else the machine does falls on all alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import httpx
from tqdm import tqdm

from clients.quality.fluency import Verdict
from clients.quality.intervals import Interval, share_interval
from clients.quality.prompts import Prompt
from clients.quality.requests import Answer, ask

EXACT = "exact"
ROUND = 8  # prompts


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
class Option:
    """One way to ask: a method, and fields for its `guidance` and `diffusion` objects. `kind` groups the plot."""

    name: str
    kind: str
    method: str = "entrgi"
    guidance: Mapping[str, Any] = field(default_factory=dict)
    diffusion: Mapping[str, Any] = field(default_factory=dict)

    def body(self, settings: Settings, reward_model: str) -> dict[str, Any]:
        """The body of a request but for the prompt."""
        body = settings.options(self.method, reward_model)
        body["guidance"] |= self.guidance
        body["diffusion"] = {**body.get("diffusion", {}), **self.diffusion}
        return body


def options(steps: int) -> tuple[Option, ...]:
    """Everything that is compared; `steps` is the exact run's T. The first is the exact run."""

    def bound(nats: float) -> dict[str, Any]:
        return {"algorithm": "entropy_bound", "entropy_bound": nats}

    def threshold(value: float) -> dict[str, Any]:
        return {"algorithm": "threshold", "confidence_threshold": value}

    return (
        Option(EXACT, "reference"),
        Option("none", "reference", "none"),
        Option("bon", "reference", "bon"),
        *(
            Option(f"entropy_bound {nats:g}", "entropy_bound", diffusion=bound(nats))
            for nats in (0.01, 0.1, 0.5, 1.0, 2.0)
        ),
        *(Option(f"threshold {value:g}", "threshold", diffusion=threshold(value)) for value in (0.95, 0.9, 0.7, 0.5)),
        Option("every 2", "window", guidance={"every": 2}),
        Option("every 4", "window", guidance={"every": 4}),
        Option("start 0.5", "window", guidance={"start": 0.5}),
        Option("stop 0.5", "window", guidance={"stop": 0.5}),
        Option("stop 0.25", "window", guidance={"stop": 0.25}),
        Option("steps / 2", "steps", diffusion={"steps": max(1, steps // 2)}),
        Option("steps / 4", "steps", diffusion={"steps": max(1, steps // 4)}),
        Option("entropy_bound 0.1, every 2", "both", guidance={"every": 2}, diffusion=bound(0.1)),
        Option("entropy_bound 0.1, stop 0.5", "both", guidance={"stop": 0.5}, diffusion=bound(0.1)),
    )


@dataclass
class Run:
    """What one option gave: an answer a prompt, and the wall seconds of each round."""

    option: Option
    answers: list[Answer] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


async def ask_all(
    client: httpx.AsyncClient,
    prompts: Sequence[Prompt],
    chosen: Sequence[Option],
    reward_model: str,
    settings: Settings,
) -> list[Run]:
    """Every prompt under every option. Prompt i has seed `settings.seed` + i under all of them. Raises ServerError."""
    runs = [Run(option) for option in chosen]
    # Nobody's first request should pay for what a server does once.
    await ask(client, prompts[:1], chosen[0].body(settings, reward_model), seed=settings.seed, concurrency=1)
    starts = range(0, len(prompts), ROUND)
    bar = tqdm(total=len(starts) * len(runs), unit="run")
    for number, start in enumerate(starts):
        turn = number % len(runs)
        for run in runs[turn:] + runs[:turn]:
            bar.set_postfix_str(f"{reward_model}, prompts from {start}, {run.option.name}")
            body = run.option.body(settings, reward_model)
            began = time.perf_counter()
            run.answers += await ask(
                client,
                prompts[start : start + ROUND],
                body,
                seed=settings.seed + start,
                concurrency=settings.concurrency,
            )
            run.seconds.append(time.perf_counter() - began)
            bar.update()
    bar.close()
    return runs


@dataclass(frozen=True)
class Row:
    """One option. `top` is the final reward of the answer that came back, `average` the mean over the K trajectories,
    `nll` the judge's nats a token of the answer; `_change` the paired difference to the exact run. `time` is the ratio
    to the exact run's: a geometric mean over rounds and its 95% interval. `fluent` is a share with its interval."""

    option: Option
    approximations: tuple[str, ...]
    steps: float
    model_calls: float
    reward_calls: float
    time: tuple[float, float, float]
    top: Interval
    top_change: Interval
    average: Interval
    average_change: Interval
    nll: Interval
    nll_change: Interval
    fluent: tuple[float, float, float]


def rows_of(runs: Sequence[Run], verdicts: Sequence[Sequence[Verdict]]) -> list[Row]:
    """A row an option; `verdicts` are of each run's answers. Raises ValueError where the exact run is missing."""
    exact = next((index for index, run in enumerate(runs) if run.option.name == EXACT), None)
    if exact is None:
        raise ValueError(f"no run is named {EXACT!r}")
    return [_row(run, judged, runs[exact], verdicts[exact]) for run, judged in zip(runs, verdicts, strict=True)]


def _row(run: Run, verdicts: Sequence[Verdict], exact: Run, exact_verdicts: Sequence[Verdict]) -> Row:
    tops, exact_tops = _tops(run), _tops(exact)
    averages, exact_averages = _averages(run), _averages(exact)
    # An empty answer has no likelihood; it counts as not fluent.
    likely = [(a.nll, b.nll) for a, b in zip(verdicts, exact_verdicts, strict=True) if math.isfinite(a.nll - b.nll)]
    logs = Interval.of([math.log(a / b) for a, b in zip(run.seconds, exact.seconds, strict=True)])
    return Row(
        option=run.option,
        approximations=run.answers[0].approximations,
        steps=fmean(answer.steps for answer in run.answers),
        model_calls=fmean(answer.model_calls for answer in run.answers),
        reward_calls=fmean(answer.reward_calls for answer in run.answers),
        time=(math.exp(logs.mean), math.exp(logs.low), math.exp(logs.high)),
        top=Interval.of(tops),
        top_change=_change(tops, exact_tops),
        average=Interval.of(averages),
        average_change=_change(averages, exact_averages),
        nll=Interval.of([a for a, _ in likely]),
        nll_change=Interval.of([a - b for a, b in likely]),
        fluent=share_interval(sum(not verdict.faults for verdict in verdicts), len(verdicts)),
    )


def _tops(run: Run) -> list[float]:
    rewards = [answer.choice_rewards[0] for answer in run.answers]
    if any(reward is None for reward in rewards):
        raise ValueError(f"the server sent no reward for {run.option.name!r}")
    return [reward for reward in rewards if reward is not None]


def _averages(run: Run) -> list[float]:
    return [fmean(answer.trajectory_rewards) for answer in run.answers]


def _change(values: Sequence[float], exact: Sequence[float]) -> Interval:
    return Interval.of([a - b for a, b in zip(values, exact, strict=True)])

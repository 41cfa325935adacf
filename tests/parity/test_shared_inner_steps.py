"""Requests of different M in one inner loop: the tokens, counters and traces of each are its own, and the reward model
reads as often as the largest M asks for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from server.budget import Budget
from server.types import (
    Job,
    JobResult,
    StepTrace,
    WeightedReward,
)
from server.worker.runner import Runner
from server.worker.savings import Savings
from tests.support.jobs import make_job, run

# (M, guidance, diffusion, sampling, traced): with and without a walk, methods, two rewards, more updates than Adam's
# history holds, equal M in different jobs, and nobody's smallest M last.
KINDS: tuple[tuple[int, dict[str, Any], dict[str, Any], dict[str, Any], bool], ...] = (
    (2, {}, {}, {"best_of": 2}, False),
    (5, {"eta": 1.0}, {}, {}, False),
    (1, {"method": "aps"}, {}, {"top_p": 0.8}, False),
    (3, {"confidence": "guided"}, {}, {"best_of": 2}, False),
    (3, {}, {"block_length": 4}, {}, True),
    (1, {"method": "expectation"}, {"algorithm": "maskgit_plus"}, {}, True),
    (4, {}, {"algorithm": "entropy_bound", "entropy_bound": 3.0}, {"temperature": 0.0}, False),
    (2, {"start": 0.2, "every": 2}, {"cfg_scale": 0.5}, {}, False),
    (3, {"method": "aps"}, {"algorithm": "origin"}, {"best_of": 2}, False),
    (0, {}, {}, {}, True),
    (2, {"reward_models": ("rm", "other")}, {}, {}, False),
    (4, {"reward_models": ("rm", "other")}, {}, {}, True),
)


def make_jobs(pair: Any) -> list[Job]:
    jobs = []
    for index, (steps, guidance, diffusion, sampling, traced) in enumerate(KINDS):
        values = {"method": "entrgi", "gradient_steps": steps, "seed": 70 + index} | guidance | diffusion | sampling
        names = values.pop("reward_models", ("rm",))
        weighted = tuple(WeightedReward(name, 1.0 - i) for i, name in enumerate(names))
        prompt = ("Hi", "Tell me about the licence.")[index % 2]
        jobs.append(
            make_job(f"job-{index}", prompt, pair.loaded.tokenizer, reward_models=weighted, trace=traced, **values)
        )
    return jobs


@pytest.fixture(scope="module")
def mixed(pair64: Any) -> dict[str, JobResult]:
    return run(pair64, make_jobs(pair64))


def test_each_has_the_plain_loops_tokens(pair64: Any, mixed: dict[str, JobResult]) -> None:
    for job in make_jobs(pair64):
        expected = pair64.plain.run(job)
        assert [list(trajectory.token_ids) for trajectory in mixed[job.id].trajectories] == expected.token_ids, job.id


def values(traces: tuple[StepTrace, ...]) -> Iterator[tuple[Any, ...]]:
    for trace in traces:
        yield tuple(
            value if value is None else pytest.approx(value, abs=1e-9)
            for value in (getattr(trace, field.name) for field in fields(StepTrace))
        )


@pytest.mark.parametrize("savings", [Savings(), Savings.without(["share_inner_steps"])], ids=["shared", "apart"])
def test_counters_and_traces_are_what_a_job_alone_has(
    pair64: Any, mixed: dict[str, JobResult], savings: Savings
) -> None:
    crowd = mixed if savings.share_inner_steps else run(pair64, make_jobs(pair64), savings=savings)
    for job in make_jobs(pair64):
        alone = run(pair64, [job])[job.id]
        assert crowd[job.id].reward_calls == alone.reward_calls
        assert crowd[job.id].model_calls == alone.model_calls
        for got, expected in zip(crowd[job.id].trajectories, alone.trajectories, strict=True):
            assert got.token_ids == expected.token_ids
            assert [
                tuple(getattr(each, field.name) for field in fields(StepTrace)) for each in got.trace
            ] == list(values(expected.trace))  # fmt: skip
    guided = [job for job in make_jobs(pair64) if job.guidance.gradient_steps and not job.guidance.start]
    for job in guided:
        assert crowd[job.id].reward_calls == job.guidance.gradient_steps * crowd[job.id].model_calls
    traced = crowd["job-4"].trajectories[0].trace
    assert any(trace.reward_before != trace.reward_after for trace in traced)


@pytest.mark.parametrize("budget", [Budget(guided_rows=24), Budget(reward_tokens=80)], ids=str)
def test_parts_of_a_mixed_batch_give_the_same(pair64: Any, mixed: dict[str, JobResult], budget: Budget) -> None:
    """Micro-batches cut the order by M anywhere."""
    parts = run(pair64, make_jobs(pair64), budget=budget, largest=Budget())
    for job_id, result in mixed.items():
        assert [t.token_ids for t in parts[job_id].trajectories] == [t.token_ids for t in result.trajectories]


class Counted:
    """A reward model that notes how many rows each of its passes has."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.passes: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def read(self, *arguments: Any) -> torch.Tensor:
        rewards: torch.Tensor = self.model.read(*arguments)
        self.passes.append(len(rewards))
        return rewards


def first_step(pair: Any, jobs: list[Job], savings: Savings) -> list[int]:
    """Rows of every pass of the reward model in a first step."""
    counted: Any = Counted(pair.rewards["rm"])
    runner = Runner(pair.loaded, {"rm": counted}, savings=savings)
    for job in jobs:
        runner.add(job, now=0.0)
    runner.step()
    return counted.passes  # type: ignore[no-any-return]


def test_a_pass_serves_all_that_are_still_there(pair64: Any) -> None:
    base = make_jobs(pair64)[0]
    jobs = [
        replace(base, id=f"m-{m}-{i}", guidance=replace(base.guidance, gradient_steps=m))
        for i, m in enumerate((1, 3, 2, 3, 5))
    ]
    # Two trajectories each: all five jobs in the first inner step, four in the second, three, one, one.
    assert first_step(pair64, jobs, Savings()) == [10, 8, 6, 2, 2]
    apart = first_step(pair64, jobs, Savings.without(["share_inner_steps"]))
    assert Counter(apart) == {2: 1 + 2 + 5, 4: 3}
    # A traced job reads once more by itself; the others leave as they would without it.
    traced = [replace(job, trace=job.id == "m-2-2") for job in jobs]
    assert Counter(first_step(pair64, traced, Savings())) == {10: 1, 8: 1, 6: 1, 2: 3}

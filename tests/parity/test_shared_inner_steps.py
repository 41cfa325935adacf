"""Requests of different M in one inner loop: the tokens, counters and traces of each are its own, and the reward model
reads as often as the largest M asks for."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from typing import Any

import pytest

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
from tests.support.models import Around

# With and without a walk, methods, two rewards, more updates than Adam's history holds, equal M in different jobs, and
# nobody's smallest M last.
KINDS: tuple[dict[str, Any], ...] = (
    {"gradient_steps": 2, "best_of": 2},
    {"gradient_steps": 5, "eta": 1.0},
    {"gradient_steps": 1, "method": "aps", "top_p": 0.8},
    {"gradient_steps": 3, "confidence": "guided", "best_of": 2},
    {"gradient_steps": 3, "block_length": 4, "trace": True},
    {"gradient_steps": 1, "method": "expectation", "algorithm": "maskgit_plus", "trace": True},
    {"gradient_steps": 4, "algorithm": "entropy_bound", "entropy_bound": 3.0, "temperature": 0.0},
    {"gradient_steps": 2, "start": 0.2, "every": 2, "cfg_scale": 0.5},
    {"gradient_steps": 3, "method": "aps", "algorithm": "origin", "best_of": 2},
    {"gradient_steps": 0, "trace": True},
    {"gradient_steps": 2, "reward_models": ("rm", WeightedReward("other", 0.0))},
    {"gradient_steps": 4, "reward_models": ("rm", WeightedReward("other", 0.0)), "trace": True},
    {"method": "bon", "block_length": 4, "best_of": 2, "trace": True},
)


def make_jobs(pair: Any) -> list[Job]:
    tokenizer, prompts = pair.loaded.tokenizer, ("Hi", "Tell me about the licence.")
    return [
        make_job(f"job-{index}", prompts[index % 2], tokenizer, **{"method": "entrgi", "seed": 70 + index} | kind)
        for index, kind in enumerate(KINDS)
    ]


@pytest.fixture(scope="module")
def mixed(pair64: Any) -> dict[str, JobResult]:
    return run(pair64, make_jobs(pair64))


def test_each_has_the_plain_loops_tokens(pair64: Any, mixed: dict[str, JobResult]) -> None:
    for job in make_jobs(pair64):
        expected = pair64.plain.run(job)
        assert [list(trajectory.token_ids) for trajectory in mixed[job.id].trajectories] == expected.token_ids, job.id


def close(trace: StepTrace) -> dict[str, Any]:
    return {name: value if value is None else pytest.approx(value, abs=1e-9) for name, value in asdict(trace).items()}


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
            assert [asdict(each) for each in got.trace] == [close(each) for each in expected.trace]
        if not job.guidance.start:
            reads = len(job.guidance.reward_models) * (job.guidance.inner_steps + job.trace)
            assert crowd[job.id].reward_calls == reads * crowd[job.id].model_calls
    traced = crowd["job-4"].trajectories[0].trace
    assert any(trace.reward_before != trace.reward_after for trace in traced)


@pytest.mark.parametrize("budget", [Budget(guided_rows=24), Budget(reward_tokens=80)], ids=str)
def test_parts_of_a_mixed_batch_give_the_same(pair64: Any, mixed: dict[str, JobResult], budget: Budget) -> None:
    """Micro-batches cut the order by M anywhere."""
    parts = run(pair64, make_jobs(pair64), budget=budget, largest=Budget())
    for job_id, result in mixed.items():
        assert [t.token_ids for t in parts[job_id].trajectories] == [t.token_ids for t in result.trajectories]


@pytest.mark.parametrize("blocks", [None, 4])
def test_an_unguided_trace_reads_what_guidance_would_read_and_changes_no_token(pair64: Any, blocks: int | None) -> None:
    """`expectation` with eta 0 moves nothing, so its rewards before guidance are those of an unguided run."""
    rewards = ("rm", WeightedReward("other", -0.5))
    shared: dict[str, Any] = {"best_of": 2, "top_p": 1.0, "block_length": blocks, "reward_models": rewards}
    idle = make_job("idle", method="expectation", gradient_steps=1, eta=0.0, trace=True, **shared)
    traced = make_job("traced", method="bon", trace=True, **shared)
    found = run(pair64, [idle, traced, make_job("untraced", method="bon", **shared)])
    for name in ("idle", "traced"):
        assert [t.token_ids for t in found[name].trajectories] == [t.token_ids for t in found["untraced"].trajectories]
    for ours, theirs in zip(found["traced"].trajectories, found["idle"].trajectories, strict=True):
        for mine, other in zip(ours.trace, theirs.trace, strict=True):
            assert mine.mean_w is None
            assert mine.reward_before == mine.reward_after == pytest.approx(other.reward_before)


class Counted(Around):
    """A reward model that notes how many rows each of its passes has."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.passes: list[int] = []

    def read(self, *arguments: Any) -> Any:
        rewards = self.model.read(*arguments)
        self.passes.append(len(rewards))
        return rewards

    def read_with_gradient(self, *arguments: Any) -> Any:
        rewards, gradient = self.model.read_with_gradient(*arguments)
        self.passes.append(len(rewards))
        return rewards, gradient


def first_step(pair: Any, jobs: list[Job], savings: Savings) -> list[int]:
    """Rows of every pass of the reward model in a first step."""
    counted: Any = Counted(pair.rewards["rm"])
    runner = Runner(pair.loaded, {"rm": counted}, savings=savings)
    for job in jobs:
        runner.add(job, now=0.0)
    runner.step()
    return list(counted.passes)


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

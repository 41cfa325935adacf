"""Resampled trajectories in the engine are those of the plain loop, alone, in a crowd and after they were parked."""

from __future__ import annotations

import random
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from server.types import Job, JobResult, Resampling, WeightedReward
from server.wire.messages import Ask, Canvas, Finished, Judged
from server.worker.runner import Runner
from server.worker.savings import Savings
from tests.parity.test_engine_matches_plain_loop import adaptive, gradient, make_job
from tests.support.models import BLOCK_CAUSAL, FAMILIES, Pair

everywhere = pytest.mark.parametrize(
    "family",
    [
        family if family in ("dream", "bd3lm") else pytest.param(family, marks=pytest.mark.slow)
        for family in (*FAMILIES, *BLOCK_CAUSAL)
    ],
    scope="session",
)

REWARD = {"reward_models": (WeightedReward("rm", 3.0),)}
THREE = {**REWARD, "best_of": 3, "temperature": 1.0, "top_p": 1.0}
SMC = {"method": "bon", **THREE}


def every(steps: int, by: Any = "reward", **values: Any) -> dict[str, Any]:
    """A rule under which some meetings copy and some do not."""
    return {"resample": Resampling(by, steps, **{"strength": 2.0, "threshold": 0.9, **values})}


CASES: dict[str, dict[str, Any]] = {
    "smc": {**SMC, **every(2)},
    "max": {**SMC, **every(3, potential="max")},
    "none by confidence": {"n": 3, "best_of": 3, "temperature": 1.2, **every(2, "confidence", strength=0.5)},
    "bon by confidence": {**SMC, "reward_models": (), **every(2, "confidence"), "n": 2},
    "entrgi": gradient("entrgi", **THREE, **every(2)),
    "aps by confidence": gradient("aps", **THREE, **every(2, "confidence", strength=0.3)),
    "origin": {**SMC, "algorithm": "origin", **every(2)},
    "greedy, ranking temperature": {**SMC, "temperature": 0.0, "algorithm_temperature": 1.0, **every(2)},
    "entropy_bound": {**SMC, **adaptive("entropy_bound"), **every(2)},
    "entrgi, threshold": gradient("entrgi", **THREE, **adaptive("threshold"), **every(1)),
    "blocks": {**SMC, "block_length": 3, "max_tokens": 10, "steps": 20, **every(2, potential="max")},
    "cfg": {**SMC, "cfg_scale": 0.5, **every(2, "confidence", strength=0.3)},
    "suffix": {**SMC, "suffix_ids": (40, 50), "response_suffix": " and so on", "stop": ("e",), **every(2)},
    "trace": {**SMC, "trace": True, "max_tokens": 6, "steps": 12, **every(2)},
    "outside": {**SMC, "scorers": (WeightedReward("length", 0.3),), **every(2)},
    "outside, guided": gradient("entrgi", **THREE, scorers=(WeightedReward("length", 0.3),), **every(1)),
    "plain": {"method": "bon", **REWARD, "best_of": 3},
}


FEW = ("smc", "max", "bon by confidence", "entrgi", "entrgi, threshold", "outside, guided")


def jobs_of(pair: Pair) -> list[Job]:
    """All cases, or of all models but one a few."""
    few = CASES if pair.loaded.info.family == "dream" else FEW
    return [make_job(pair, index, **CASES[case]) for index, case in enumerate(CASES) if case in few]


def outside(texts: list[str]) -> dict[str, list[float]]:
    return {"length": [float(len(text) % 7) for text in texts]}


def finish(pair: Pair, jobs: list[Job], seed: int = 0, **options: Any) -> dict[str, JobResult]:
    """All jobs in one runner; outside scorers answer some steps later, in any order."""
    runner, waiting = Runner(pair.loaded, pair.rewards, **options), list[Ask]()
    for job in jobs:
        runner.add(job, now=0.0)
    order, results = random.Random(seed), {}
    while runner.has_work or waiting:
        events = runner.step() if runner.has_work else []
        waiting += [event for event in events if isinstance(event, Ask)]
        results |= {event.job_id: event.result for event in events if isinstance(event, Finished)}
        if waiting and (not runner.has_work or order.random() < 0.3):
            ask = waiting.pop(order.randrange(len(waiting)))
            runner.judged(Judged(ask.job_id, ask.step, outside(ask.texts)))
    assert results.keys() == {job.id for job in jobs}
    return results


@pytest.fixture(scope="session")
def crowd(pair64: Pair) -> dict[str, JobResult]:
    jobs = jobs_of(pair64)
    random.Random(0).shuffle(jobs)
    return finish(pair64, jobs)


def assert_same(result: JobResult, expected: Any) -> None:
    assert [list(each.token_ids) for each in result.trajectories] == expected.token_ids
    assert [list(each.step_map) for each in result.trajectories] == expected.step_maps
    assert [each.text for each in result.trajectories] == expected.texts
    assert list(result.resampled) == expected.resampled
    assert result.chosen == expected.chosen
    weights = expected.weights
    assert result.weights == (None if weights is None else pytest.approx(weights, abs=1e-4))
    for trajectory, reward in zip(result.trajectories, expected.rewards, strict=True):
        assert trajectory.reward == (None if reward is None else pytest.approx(reward, abs=1e-4))


@everywhere
def test_resampled_trajectories_equal_the_plain_loop_in_float64(pair64: Pair, crowd: Any) -> None:
    for job in jobs_of(pair64):
        expected = pair64.plain.run(job, outside if job.guidance.scorers else None)
        assert_same(crowd[job.id], expected)
        if pair64.loaded.info.family == "dream":
            assert_same(finish(pair64, [job])[job.id], expected)


@everywhere
def test_savings_change_nothing_where_some_trajectories_are_copied_and_some_go_on(pair64: Pair, crowd: Any) -> None:
    none = Savings.without(field.name for field in fields(Savings))
    without = finish(pair64, jobs_of(pair64), seed=1, savings=none)
    for job_id, result in crowd.items():
        other = without[job_id]
        assert [each.token_ids for each in other.trajectories] == [each.token_ids for each in result.trajectories]
        assert (other.resampled, other.weights is None) == (result.resampled, result.weights is None)
    assert any(len(set(chosen)) > 1 for result in crowd.values() for _, chosen in result.resampled)


@pytest.mark.parametrize("family", ["dream"], scope="session")
def test_a_trace_is_that_of_the_lineage(pair64: Pair, crowd: Any) -> None:
    index = list(CASES).index("trace")
    job = make_job(pair64, index, **CASES["trace"])
    meetings, result = pair64.plain.run(job).meetings, crowd[job.id]
    rule = job.guidance.resample
    scores, last = [], np.zeros(job.sampling.best_of)
    for meeting in meetings:
        scores.append(last + np.array(meeting.log_weights) / rule.strength)
        last = scores[-1][list(meeting.ancestors)] if meeting.ancestors else last
    assert len(result.resampled) > 1
    for trajectory in result.trajectories:
        steps = [step for step in trajectory.trace if step.mean_entropy is not None]
        assert sum(step.revealed for step in steps) == len(trajectory.token_ids)
        met = {taken: step for taken, step in enumerate(steps, start=1) if step.ancestor is not None}
        assert list(met) == [rule.every * (at + 1) for at in range(len(meetings))]
        place = trajectory.index
        for meeting, score, step in reversed(list(zip(meetings, scores, met.values(), strict=True))):
            place = meeting.ancestors[place] if meeting.ancestors else place
            assert step.ancestor == place
            assert step.log_weight == pytest.approx(meeting.log_weights[place], abs=1e-4)
            assert step.reward_estimate == pytest.approx(score[place], abs=1e-4)


@pytest.mark.parametrize("family", ["dream"], scope="session")
def test_the_last_canvas_of_each_trajectory_is_its_answer_though_it_is_a_copy_of_a_finished_one(pair64: Pair) -> None:
    rule = {**every(4, threshold=1.0), "reward_models": (WeightedReward("rm", 9.0),)}
    values = {**SMC, **adaptive("entropy_bound"), **rule, "stream_canvas": True, "best_of": 4}
    runner, last, results = Runner(pair64.loaded, pair64.rewards), dict[tuple[str, int], Canvas](), {}
    for seed in range(5, 8):
        runner.add(make_job(pair64, seed, **values), now=0.0)
    while runner.has_work:
        for event in runner.step():
            if isinstance(event, Canvas):
                last[event.job_id, event.trajectory] = event
            elif isinstance(event, Finished):
                results[event.job_id] = event.result
    for (job_id, index), canvas in last.items():
        assert tuple(canvas.token_ids) == results[job_id].trajectories[index].token_ids
    assert any(canvas.entropy is None for canvas in last.values())

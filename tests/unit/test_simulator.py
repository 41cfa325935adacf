"""The simulation of replicas against what queueing theory and arithmetic say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.flops import Decoder
from benchmarks.gpu.estimate import Canvas
from benchmarks.simulated_cpu import Fitted
from benchmarks.simulator import POLICIES, Load, Outcome, Replica, simulate
from server.budget import Budget
from server.diffusion.schedule import plan
from server.types import Job

ONE_STEP = Load(best_of=((1, 1.0),), answer=(8, 0.0, 8, 8), steps=(1 / 8,), guided=0.0)


def second(step: Sequence[Canvas], begun: Sequence[Job], ended: Sequence[Job]) -> float:
    """Every step takes one."""
    return 1.0


def run(load: Load, count: int, rate: float, replicas: int = 1, policy: str = "least work", most: int = 256) -> Outcome:
    each = [Replica(second, Budget(trajectories=most)) for _ in range(replicas)]
    return simulate(load.jobs(count, 1), load.arrivals(rate, count, 2), each, policy=policy)


def steps_that_reveal(job: Job) -> int:
    return sum(step.reveal > 0 for step in plan(job.sampling.max_tokens, job.diffusion, job.guidance))


def test_one_at_a_time_waits_as_long_as_pollaczek_and_khinchin_say() -> None:
    """M/D/1: at load rho the mean wait is rho / (2 (1 - rho)) services."""
    outcome = run(ONE_STEP, 2000, rate=0.6, most=1)
    waits = [wait for _, _, wait in outcome.answered]
    assert sum(waits) / len(waits) == pytest.approx(0.6 / (2 * 0.4), rel=0.1)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_is_answered_once_and_takes_its_steps(policy: str) -> None:
    load = replace(Load(), answer=(16, 0.5, 4, 32))
    outcome = run(load, 60, rate=2.0, replicas=4, policy=policy)
    assert {job.id for job, _, _ in outcome.answered} == {job.id for job in load.jobs(60, 1)}
    assert len(outcome.answered) == 60
    needed = {job.id: steps_that_reveal(job) for job, _, _ in outcome.answered}
    assert all(latency - wait >= needed[job.id] - 1e-9 for job, latency, wait in outcome.answered)
    steps = sum(count for replica in outcome.replicas for _, count, _ in replica.sizes)
    assert steps == sum(job.sampling.best_of * needed[job.id] for job, _, _ in outcome.answered)


def test_a_budget_bounds_what_runs_and_lockstep_is_shared() -> None:
    jobs = ONE_STEP.jobs(12, 1)
    for most, seconds in ((1, 12), (4, 3), (256, 1)):
        replica = Replica(second, Budget(trajectories=most))
        assert simulate(jobs, [0.0] * 12, [replica], in_flight=12).seconds == seconds
        assert max(count for _, count, _ in replica.sizes) == min(most, 12)


def test_the_dispatcher_is_fairer_than_chance() -> None:
    load = replace(Load(), answer=(8, 0.7, 2, 16))
    rows = {policy: run(load, 200, 1.0, 4, policy, most=1).row(second) for policy in ("least work", "random")}
    assert rows["least work"]["latency_p99"] < rows["random"]["latency_p99"]
    assert rows["least work"]["fairness"] > rows["random"]["fairness"]


def test_what_is_outside_of_steps_is_waited_for() -> None:
    """Each answer is half a second later, and so are the next requests of who waits for it."""
    jobs = ONE_STEP.jobs(6, 1)
    outcome = simulate(jobs, [0.0] * 6, [Replica(second, Budget())], in_flight=2, outside=0.5)
    assert [latency for _, latency, _ in outcome.answered] == [1.5] * 6
    assert outcome.seconds == 0.5 + 3 * 1.5


def test_the_fit_finds_the_cost_that_made_the_steps() -> None:
    load = replace(Load(), answer=(16, 0.5, 4, 32))
    seen: list[tuple[list[float], float]] = []
    decoder = Decoder(16, 2, 2, 1, 8, 32)
    made = Fitted(decoder, decoder, 100, (1e-3, 2e-3, 1e-4, *[0.0] * 2, 1e-9, 0.0, 1e-9, *[0.0] * 7))

    def cost(step: Sequence[Canvas], begun: Sequence[Job], ended: Sequence[Job]) -> float:
        seen.append((made.features(step, begun, ended), made(step, begun, ended)))
        return seen[-1][1]

    simulate(load.jobs(30, 1), [0.0] * 30, [Replica(cost, Budget())], in_flight=4)
    found = replace(made, weights=()).fit(seen)
    rows = np.array([row for row, _ in seen])
    np.testing.assert_allclose(rows @ found.weights, [spent for _, spent in seen], rtol=1e-3)

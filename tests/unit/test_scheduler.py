"""Admission: order, budgets, jobs in parts, no starvation. No tensors, so thousands of cases take no time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.scheduler import Budget, Scheduler, Ticket
from server.errors import InvalidRequest
from server.types import DiffusionParams, GuidanceParams, Job, SamplingParams, WeightedReward


def job(name: str, tokens: int = 10, best_of: int = 1, method: str = "none", priority: int = 0) -> Job:
    rewards = (WeightedReward("rm"),) if method != "none" else ()
    return Job(
        id=name,
        prompt_ids=(1, 2),
        sampling=SamplingParams(max_tokens=tokens, best_of=best_of, n=1),
        diffusion=DiffusionParams(steps=tokens),
        guidance=GuidanceParams(method=method, reward_models=rewards),  # type: ignore[arg-type]
        priority=priority,
    )


def names(tickets: list[Ticket]) -> list[str]:
    return [f"{ticket.job.id}{ticket.index}" for ticket in tickets]


def test_first_come_first_served_and_a_job_runs_in_parts() -> None:
    scheduler = Scheduler(Budget(trajectories=3))
    scheduler.add(job("a", best_of=2))
    scheduler.add(job("b", best_of=2))
    first = scheduler.admit()
    assert names(first) == ["a0", "a1", "b0"]
    assert scheduler.admit() == []
    scheduler.release(first[0])
    assert names(scheduler.admit()) == ["b1"]


def test_a_lower_priority_number_goes_first() -> None:
    scheduler = Scheduler(Budget(trajectories=1))
    scheduler.add(job("late", priority=5))
    scheduler.add(job("soon", priority=-1))
    assert names(scheduler.admit()) == ["soon0"]


def test_guided_rows_and_tokens_are_budgets_of_their_own() -> None:
    scheduler = Scheduler(Budget(tokens=1000, guided_rows=15))
    for name in "ab":
        scheduler.add(job(name, method="entrgi"))
    assert names(scheduler.admit()) == ["a0"]
    free = Scheduler(Budget(tokens=25, guided_rows=0))
    for name in "abc":
        free.add(job(name))
    assert names(free.admit()) == ["a0", "b0"]


def test_what_can_never_run_is_refused_with_the_budget_it_exceeds() -> None:
    scheduler = Scheduler(Budget(tokens=100, guided_rows=50))
    with pytest.raises(InvalidRequest, match="100"):
        scheduler.add(job("wide", tokens=99))
    with pytest.raises(InvalidRequest, match="50"):
        scheduler.add(job("guided", tokens=60, method="aps"))
    assert scheduler.waiting_trajectories == 0


def test_small_jobs_do_not_starve_a_big_one() -> None:
    scheduler = Scheduler(Budget(tokens=100))
    scheduler.add(job("small0", tokens=40))
    running = scheduler.admit()
    scheduler.add(job("big", tokens=90))
    for index in range(1, 5):
        scheduler.add(job(f"small{index}", tokens=10))
    assert scheduler.admit() == []  # nothing overtakes the head of the queue
    scheduler.release(running[0])
    assert names(scheduler.admit()) == ["big0"]


def test_a_dropped_job_gives_its_room_back() -> None:
    scheduler = Scheduler(Budget(trajectories=2))
    scheduler.add(job("a", best_of=4))
    scheduler.admit()
    assert scheduler.drop("a") == 4
    assert scheduler.drop("a") == 0
    scheduler.add(job("b", best_of=2))
    assert names(scheduler.admit()) == ["b0", "b1"]


@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 5), st.sampled_from(["none", "entrgi"]), st.integers(-1, 1)),
        max_size=30,
    ),
    st.randoms(),
)
def test_everything_runs_once_and_the_budget_always_holds(
    specs: list[tuple[int, int, str, int]], random: object
) -> None:
    budget = Budget(tokens=100, guided_rows=60, trajectories=5)
    scheduler = Scheduler(budget)
    for index, (tokens, best_of, method, priority) in enumerate(specs):
        scheduler.add(job(f"job{index}/", tokens, best_of, method, priority))
    seen: list[str] = []
    running: list[Ticket] = []
    while True:
        running += scheduler.admit()
        if not running:
            break
        assert len(running) <= budget.trajectories
        assert sum(2 + ticket.job.sampling.max_tokens for ticket in running) <= budget.tokens
        guided = [ticket for ticket in running if ticket.job.guidance.uses_gradient]
        assert sum(ticket.job.sampling.max_tokens for ticket in guided) <= budget.guided_rows
        ticket = running.pop(random.randrange(len(running)))  # type: ignore[attr-defined]
        seen += names([ticket])
        scheduler.release(ticket)
    assert sorted(seen) == sorted(f"job{i}/{k}" for i, spec in enumerate(specs) for k in range(spec[1]))
    assert scheduler.waiting_trajectories == scheduler.running_trajectories == 0

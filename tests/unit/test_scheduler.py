"""Admission: order, budgets, jobs in parts, no starvation. No tensors, so thousands of cases take no time."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.budget import Budget, Cost
from server.errors import InvalidRequest
from server.types import DiffusionParams, GuidanceParams, Job, SamplingParams, WeightedReward
from server.worker.scheduler import Scheduler, Ticket


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


def test_tokens_bound_what_runs_together_and_guided_rows_only_one_trajectory() -> None:
    scheduler = Scheduler(Budget(tokens=25, guided_rows=10))
    for name in "abc":
        scheduler.add(job(name, method="entrgi"))
    assert names(scheduler.admit()) == ["a0", "b0"]  # 20 guided rows: they are steered in two micro-batches
    free = Scheduler(Budget(tokens=25, guided_rows=0))
    free.add(job("a"))
    assert names(free.admit()) == ["a0"]


def test_a_trajectory_above_the_budget_but_not_above_the_largest_runs_alone() -> None:
    scheduler = Scheduler(Budget(tokens=30), Budget(tokens=100))
    scheduler.add(job("small", tokens=10))
    scheduler.add(job("big", tokens=60, best_of=2))
    scheduler.add(job("after", tokens=10))
    with pytest.raises(InvalidRequest, match="100"):
        scheduler.add(job("never", tokens=99))
    order = []
    while tickets := scheduler.admit():
        order.append(names(tickets))
        for ticket in tickets:
            scheduler.release(ticket)
    assert order == [["small0"], ["big0"], ["big1"], ["after0"]]


def test_the_cached_conversation_is_paid_once_a_job_until_its_last_trajectory_leaves() -> None:
    scheduler = Scheduler(Budget(cached_tokens=100))
    for name in "abc":
        guided = job(name, method="entrgi", best_of=2)
        scheduler.add(guided, Cost.of(guided, reward_tokens=10, cached_tokens=40))
    scheduler.add(job("unguided"))
    a0, a1, b0, b1 = scheduler.admit()
    assert names([a0, a1, b0, b1]) == ["a0", "a1", "b0", "b1"]
    scheduler.release(a0)
    assert scheduler.admit() == []  # c comes first, and a's conversation is still there
    scheduler.release(a1)
    assert names(scheduler.admit()) == ["c0", "c1", "unguided0"]
    assert scheduler.drop("b") == 2


def test_what_a_trajectory_caches_of_its_own_answer_is_given_back_with_it() -> None:
    scheduler = Scheduler(Budget(cached_tokens=100))
    for name in "ab":
        guided = job(name, method="entrgi", best_of=3)
        scheduler.add(guided, Cost.of(guided, cached_tokens=20, grown_tokens=30))
    first, second = scheduler.admit()
    assert names([first, second]) == ["a0", "a1"]
    scheduler.release(first)
    (third,) = scheduler.admit()
    assert names([third]) == ["a2"]
    scheduler.release(second)
    scheduler.release(third)
    assert names(scheduler.admit()) == ["b0", "b1"]
    with pytest.raises(InvalidRequest, match="101 cached"):
        scheduler.add(guided, Cost.of(guided, cached_tokens=70, grown_tokens=31))


def test_a_job_that_waits_for_the_cache_lets_those_finish_that_hold_it() -> None:
    """Else both would wait for ever: the urgent job for the cache, its holder for its turn."""
    scheduler = Scheduler(Budget(trajectories=1, cached_tokens=100))
    slow, urgent = (job(name, method="entrgi", best_of=2, priority=p) for name, p in (("slow", 0), ("urgent", -1)))
    scheduler.add(slow, Cost.of(slow, cached_tokens=60))
    running = scheduler.admit()
    scheduler.add(urgent, Cost.of(urgent, cached_tokens=60))
    seen = names(running)
    while running:
        scheduler.release(running.pop())
        running = scheduler.admit()
        seen += names(running)
    assert seen == ["slow0", "slow1", "urgent0", "urgent1"]


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


def test_a_big_job_does_not_hold_up_small_ones_for_longer_than_it_runs() -> None:
    scheduler = Scheduler(Budget(trajectories=4))
    scheduler.add(job("big", best_of=10))
    for index in range(3):
        scheduler.add(job(f"small{index}-"))
    passes, seen = 0, []
    while tickets := scheduler.admit():
        passes += 1
        seen += names(tickets)
        for ticket in tickets:
            scheduler.release(ticket)
    assert seen == [*(f"big{k}" for k in range(10)), "small0-0", "small1-0", "small2-0"]
    assert passes == 4  # the last two of the big job share theirs with two small ones


SPECS = st.lists(
    st.tuples(
        st.integers(0, 40),  # the step at which it arrives
        st.integers(1, 60),  # canvas
        st.integers(1, 5),  # best_of
        st.integers(-1, 1),  # priority
        st.integers(0, 60),  # cached tokens of the conversation
        st.integers(0, 20),  # and of each answer
        st.integers(1, 6),  # steps that each trajectory takes
    ),
    max_size=30,
)


@settings(deadline=None, max_examples=300)
@given(SPECS)
def test_everything_runs_once_within_the_budget_and_nobody_waits_for_more_than_the_work_before_him(
    specs: list[tuple[int, ...]],
) -> None:
    budget, largest = Budget(tokens=50, trajectories=5, cached_tokens=50), Budget(tokens=62, cached_tokens=80)
    scheduler = Scheduler(budget, largest)
    arrivals: dict[int, list[int]] = {}
    for index, spec in enumerate(specs):
        arrivals.setdefault(spec[0], []).append(index)
    running: dict[tuple[int, int], tuple[Ticket, int]] = {}  # (job, trajectory) -> its ticket and the step of its end
    began: dict[int, int] = {}
    ended: dict[tuple[int, int], int] = {}
    arrived: list[int] = []
    step = 0
    while running or scheduler.waiting_trajectories or any(at >= step for at in arrivals):
        for index in arrivals.pop(step, []):
            _, tokens, best_of, priority, cached, grown, _ = specs[index]
            guided = job(str(index), tokens, best_of, "entrgi", priority)
            scheduler.add(guided, Cost.of(guided, cached_tokens=cached, grown_tokens=grown))
            arrived.append(index)
        for ticket in scheduler.admit():
            index = int(ticket.job.id)
            began.setdefault(index, step)
            assert (index, ticket.index) not in running
            running[index, ticket.index] = (ticket, step + specs[index][6])
        assert running or not scheduler.waiting_trajectories  # there is always somebody to move on
        costs = [2 + specs[index][1] for index, _ in running]
        assert len(running) <= budget.trajectories
        assert sum(costs) <= budget.tokens or len(costs) == 1
        open_jobs = {i for i in began if sum((i, k) in ended for k in range(specs[i][2])) < specs[i][2]}
        held = sum(specs[i][4] for i in open_jobs) + sum(specs[i][5] for i, _ in running)
        # Above the budget is only who began when nothing ran; what caches nothing more may join him.
        caching = [key for key in running if specs[key[0]][5] or (not key[1] and specs[key[0]][4])]
        assert held <= budget.cached_tokens or len(caching) <= 1
        step += 1
        for key, (_, end) in list(running.items()):
            if end <= step:
                scheduler.release(running.pop(key)[0])
                ended[key] = step
    assert sorted(ended) == sorted((i, k) for i, spec in enumerate(specs) for k in range(spec[2]))
    assert scheduler.waiting_trajectories == scheduler.running_trajectories == 0
    for index in arrived:
        # While it waits somebody runs, and only who has priority, came before, or had begun: at most all their steps.
        at, _, _, priority, *_ = specs[index]
        ahead = [other for other in arrived if other != index and began[other] <= began[index]]
        assert began[index] - at <= sum(specs[other][2] * specs[other][6] for other in ahead)
        for other in ahead:
            assert not (at <= began[other] < began[index] and specs[other][3] > priority)
        # Within a priority nobody begins before who came earlier.
        same = [other for other in arrived[: arrived.index(index)] if specs[other][3] == priority]
        assert all(began[other] <= began[index] for other in same)

"""Admission: order, budgets, jobs in parts, no starvation. No tensors, so thousands of cases take no time."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.budget import Budget, Cost
from server.errors import InvalidRequest
from server.types import Job, Resampling
from server.worker.book import Book, Entry
from tests.support.jobs import make_job

Share = tuple[Entry, int]


def job(name: str, tokens: int = 10, best_of: int = 1, method: str = "none", priority: int = 0) -> Job:
    return make_job(name, prompt_ids=(1, 2), max_tokens=tokens, best_of=best_of, method=method, priority=priority)


def admit(book: Book) -> list[Share]:
    """All that may start now."""
    shares = []
    while (admitted := book.admit()) is not None:
        entry, indices = admitted
        shares += [(entry, index) for index in indices]
    return shares


def release(book: Book, share: Share) -> None:
    """What the runner does when a trajectory has ended, and when all of a job's have."""
    entry, index = share
    finished: Any = "its trajectory"
    entry.finished[index] = finished
    if len(entry.finished) == entry.job.sampling.best_of:
        book.drop(entry.job.id)


def names(shares: list[Share]) -> list[str]:
    return [f"{entry.job.id}{index}" for entry, index in shares]


def passes(book: Book) -> list[list[str]]:
    """Who runs together, when all that run end together, until nobody waits."""
    order = []
    while shares := admit(book):
        order.append(names(shares))
        for share in shares:
            release(book, share)
    return order


def test_first_come_first_served_and_a_job_runs_in_parts() -> None:
    book = Book(Budget(trajectories=3))
    book.add(job("a", best_of=2))
    book.add(job("b", best_of=2))
    first = admit(book)
    assert names(first) == ["a0", "a1", "b0"]
    assert admit(book) == []
    release(book, first[0])
    assert names(admit(book)) == ["b1"]


def test_tokens_bound_what_runs_together_and_guided_rows_only_one_trajectory() -> None:
    book = Book(Budget(tokens=25, guided_rows=10))
    for name in "abc":
        book.add(job(name, method="entrgi"))
    assert names(admit(book)) == ["a0", "b0"]  # 20 guided rows: they are steered in two micro-batches
    free = Book(Budget(tokens=25, guided_rows=0))
    free.add(job("a"))
    assert names(admit(free)) == ["a0"]


def test_the_cached_conversation_is_paid_once_a_job_until_its_last_trajectory_leaves() -> None:
    book = Book(Budget(cached_tokens=100))
    for name in "abc":
        guided = job(name, method="entrgi", best_of=2)
        book.add(guided, Cost.of(guided, reward_tokens=10, cached_tokens=40))
    book.add(job("unguided"))
    a0, a1, b0, b1 = admit(book)
    assert names([a0, a1, b0, b1]) == ["a0", "a1", "b0", "b1"]
    release(book, a0)
    assert admit(book) == []  # c comes first, and a's conversation is still there
    release(book, a1)
    assert names(admit(book)) == ["c0", "c1", "unguided0"]
    assert book.drop("b")


def test_what_a_trajectory_caches_of_its_own_answer_is_given_back_with_it() -> None:
    book = Book(Budget(cached_tokens=100))
    for name in "ab":
        guided = job(name, method="entrgi", best_of=3)
        book.add(guided, Cost.of(guided, cached_tokens=20, grown_tokens=30))
    first, second = admit(book)
    assert names([first, second]) == ["a0", "a1"]
    release(book, first)
    (third,) = admit(book)
    assert names([third]) == ["a2"]
    release(book, second)
    release(book, third)
    assert names(admit(book)) == ["b0", "b1"]
    with pytest.raises(InvalidRequest, match="101 cached"):
        book.add(guided, Cost.of(guided, cached_tokens=70, grown_tokens=31))


def test_a_job_that_waits_for_the_cache_lets_those_finish_that_hold_it() -> None:
    """Else both would wait for ever: the urgent job for the cache, its holder for its turn."""
    book = Book(Budget(trajectories=1, cached_tokens=100))
    slow, urgent = (job(name, method="entrgi", best_of=2, priority=p) for name, p in (("slow", 0), ("urgent", -1)))
    book.add(slow, Cost.of(slow, cached_tokens=60))
    running = admit(book)
    book.add(urgent, Cost.of(urgent, cached_tokens=60))
    seen = names(running)
    while running:
        release(book, running.pop())
        running = admit(book)
        seen += names(running)
    assert seen == ["slow0", "slow1", "urgent0", "urgent1"]


def test_a_batch_leaves_room_for_others_to_begin_at_once() -> None:
    book = Book(Budget(trajectories=4, tokens=120))
    book.add(job("line", best_of=9, priority=1))
    assert names(admit(book)) == ["line0", "line1", "line2"]
    book.add(job("asked", best_of=2))
    assert names(admit(book)) == ["asked0"]  # the other when any of them ends
    wide = Book(Budget(tokens=120))
    wide.add(job("line", tokens=40, best_of=3, priority=1))
    assert names(admit(wide)) == ["line0", "line1"]  # 42 each, of 90


def resampled(name: str, tokens: int = 10, best_of: int = 4, priority: int = 0) -> Job:
    values = {"max_tokens": tokens, "best_of": best_of, "n": best_of, "priority": priority}
    return make_job(name, prompt_ids=(1, 2), resample=Resampling("confidence"), **values)


def test_trajectories_that_are_resampled_begin_together_and_nothing_overtakes_them() -> None:
    book = Book(Budget(trajectories=5, tokens=60))
    book.add(job("first", best_of=2))
    book.add(resampled("smc"))
    book.add(job("last"))
    running = admit(book)
    assert names(running) == ["first0", "first1"]
    release(book, running[0])
    assert names(admit(book)) == ["smc0", "smc1", "smc2", "smc3"]
    release(book, running[1])
    assert names(admit(book)) == ["last0"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"best_of": 6}, "6 trajectories that are resampled run together and take 6 trajectories, more than the 5"),
        ({"tokens": 18}, "take 80 canvas tokens, more than the 60"),
    ],
)
def test_trajectories_that_could_never_run_together_are_refused(values: dict[str, Any], message: str) -> None:
    book = Book(Budget(trajectories=5, tokens=60))
    with pytest.raises(InvalidRequest, match=message):
        book.add(resampled("smc", **values))


@pytest.mark.parametrize("values", [{"best_of": 7}, {"best_of": 2, "tokens": 36}])
def test_what_of_a_batch_needs_more_than_its_part_begins_beside_others(values: dict[str, Any]) -> None:
    book = Book(Budget(trajectories=8, tokens=96))
    book.add(job("asked"))
    book.add(resampled("line", priority=1, **values))
    assert len(admit(book)) == 1 + values["best_of"]


@pytest.mark.parametrize(("values", "limit"), [({"tokens": 99}, "100"), ({"tokens": 60, "method": "aps"}, "50")])
def test_what_can_never_run_is_refused_with_the_budget_it_exceeds(values: dict[str, Any], limit: str) -> None:
    book = Book(Budget(tokens=100, guided_rows=50))
    with pytest.raises(InvalidRequest, match=limit):
        book.add(job("wide", **values))
    assert book.waiting == 0


def test_a_big_job_does_not_hold_up_small_ones_for_longer_than_it_runs() -> None:
    book = Book(Budget(trajectories=4))
    book.add(job("big", best_of=10))
    for index in range(3):
        book.add(job(f"small{index}-"))
    first, second, shared, last = passes(book)
    assert [*first, *second] == [f"big{k}" for k in range(8)]
    assert (shared, last) == (["big8", "big9", "small0-0", "small1-0"], ["small2-0"])


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
def test_everything_runs_once_within_the_budget_and_waits_for_no_more_than_the_work_before_it(
    specs: list[tuple[int, ...]],
) -> None:
    budget, largest = Budget(tokens=50, trajectories=5, cached_tokens=50), Budget(tokens=62, cached_tokens=80)
    book = Book(budget, largest)
    arrivals: dict[int, list[int]] = {}
    for index, spec in enumerate(specs):
        arrivals.setdefault(spec[0], []).append(index)
    running: dict[tuple[int, int], tuple[Share, int]] = {}  # (job, trajectory) -> its share and the step of its end
    began: dict[int, int] = {}
    ended: dict[tuple[int, int], int] = {}
    arrived: list[int] = []
    step = 0
    while running or book.waiting or any(at >= step for at in arrivals):
        for index in arrivals.pop(step, []):
            _, tokens, best_of, priority, cached, grown, _ = specs[index]
            guided = job(str(index), tokens, best_of, "entrgi", priority)
            book.add(guided, Cost.of(guided, cached_tokens=cached, grown_tokens=grown))
            arrived.append(index)
        for share in admit(book):
            index = int(share[0].job.id)
            began.setdefault(index, step)
            assert (index, share[1]) not in running
            running[index, share[1]] = (share, step + specs[index][6])
        assert running or not book.waiting  # there is always a trajectory that moves on
        costs = [2 + specs[index][1] for index, _ in running]
        assert len(running) <= budget.trajectories
        assert sum(costs) <= budget.tokens or len(costs) == 1
        open_jobs = {i for i in began if sum((i, k) in ended for k in range(specs[i][2])) < specs[i][2]}
        held = sum(specs[i][4] for i in open_jobs) + sum(specs[i][5] for i, _ in running)
        # Above the budget is only what began when nothing ran; what caches nothing more may join it.
        caching = [key for key in running if specs[key[0]][5] or (not key[1] and specs[key[0]][4])]
        assert held <= budget.cached_tokens or len(caching) <= 1
        step += 1
        for key, (_, end) in list(running.items()):
            if end <= step:
                release(book, running.pop(key)[0])
                ended[key] = step
    assert sorted(ended) == sorted((i, k) for i, spec in enumerate(specs) for k in range(spec[2]))
    assert book.waiting == book.running == 0
    for index in arrived:
        # While it waits others run that have priority, came before, or had begun: for at most all their steps.
        at, _, _, priority, *_ = specs[index]
        ahead = [other for other in arrived if other != index and began[other] <= began[index]]
        assert began[index] - at <= sum(specs[other][2] * specs[other][6] for other in ahead)
        for other in ahead:
            assert not (at <= began[other] < began[index] and specs[other][3] > priority)
        # Within a priority no job begins before one that came earlier.
        same = [other for other in arrived[: arrived.index(index)] if specs[other][3] == priority]
        assert all(began[other] <= began[index] for other in same)

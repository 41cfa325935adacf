"""Which worker gets which job, which job is blamed for a worker's death, and what kills from outside cost: cases, and
random lives of pretended workers."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.front.dispatch import Dispatcher, cost_of
from server.front.pending import Pending
from server.types import DiffusionParams, GuidanceParams, Job, Message, SamplingParams
from server.wire.messages import Score


def add(dispatcher: Dispatcher, name: str, cost: float = 1.0) -> Pending:
    pending = Pending(name, b"", cost=cost)
    dispatcher.add(pending)
    return pending


def given_to(dispatcher: Dispatcher, ready: list[int], *, more_to_come: bool = False) -> list[tuple[int, str]]:
    return [(worker, pending.id) for worker, pending in dispatcher.assign(ready, more_to_come=more_to_come)]


def test_work_goes_to_the_worker_with_the_least_of_it() -> None:
    dispatcher = Dispatcher(2)
    jobs = [add(dispatcher, name, cost) for name, cost in (("long", 5.0), ("a", 2.0), ("b", 2.0), ("c", 2.0))]
    assert given_to(dispatcher, [0, 1]) == [(0, "long"), (1, "a"), (1, "b"), (1, "c")]
    assert (dispatcher.outstanding(0), dispatcher.outstanding(1)) == (5.0, 6.0)
    for pending in jobs[1:]:
        dispatcher.remove(pending)
    assert dispatcher.outstanding(1) == 0.0
    add(dispatcher, "next")
    assert given_to(dispatcher, [0, 1]) == [(1, "next")]


def lose(dispatcher: Dispatcher, worker: int) -> list[str]:
    """A worker dies; who is convicted of it."""
    return [pending.id for pending in dispatcher.lost(worker) if pending.convicted]


def test_queued_jobs_of_a_dead_worker_move_at_once_and_running_ones_run_apart() -> None:
    dispatcher = Dispatcher(2)
    jobs = {name: add(dispatcher, name) for name in ("running 1", "running 2", "queued 1", "queued 2")}
    given_to(dispatcher, [0])
    busy = add(dispatcher, "busy", 9.0)
    given_to(dispatcher, [1])
    jobs["running 1"].begun = jobs["running 2"].begun = True
    assert (dispatcher.suspects, lose(dispatcher, 0), dispatcher.suspects) == (0, [], 2)
    assert given_to(dispatcher, [1], more_to_come=True) == [(1, "queued 1"), (1, "queued 2")]
    # The dead worker's successor takes one group of suspects (here of one), and nothing else until that is done.
    add(dispatcher, "new")
    assert given_to(dispatcher, [0, 1]) == [(0, "running 1"), (1, "new")]
    assert dispatcher.suspects == 2  # waiting or running
    dispatcher.remove(jobs["running 1"])
    assert given_to(dispatcher, [0, 1]) == [(0, "running 2")]
    dispatcher.remove(jobs["running 2"])
    add(dispatcher, "newer")
    assert given_to(dispatcher, [0, 1]) == [(0, "newer")]
    assert (dispatcher.suspects, busy.suspect) == (0, False)


def test_nine_suspects_run_in_threes_and_those_of_a_group_that_dies_alone() -> None:
    dispatcher = Dispatcher(1)
    jobs = [add(dispatcher, str(index)) for index in range(9)]
    given_to(dispatcher, [0])
    for pending in jobs:
        pending.begun = True
    assert lose(dispatcher, 0) == []
    add(dispatcher, "new")

    for expected, dies in (
        ("0 1 2", True),  # none of them was alone
        ("3 4 5", False),
        ("6 7 8", False),
        ("0", False),
        ("1", True),  # once alone
        ("2", False),
    ):
        assert [name for _, name in given_to(dispatcher, [0])] == expected.split()
        assert given_to(dispatcher, [0]) == []
        if dies:
            assert lose(dispatcher, 0) == []
        else:
            for name in expected.split():
                dispatcher.remove(jobs[int(name)])
    assert given_to(dispatcher, [0]) == [(0, "1")]
    assert lose(dispatcher, 0) == ["1"]
    assert given_to(dispatcher, [0]) == [(0, "new")]


def test_suspects_do_not_wait_for_ever_for_a_worker_that_does_not_come_back() -> None:
    dispatcher = Dispatcher(2)
    suspect, busy = add(dispatcher, "suspect"), add(dispatcher, "busy")
    given_to(dispatcher, [0, 1])
    suspect.begun = True
    dispatcher.lost(0)
    add(dispatcher, "new")
    assert given_to(dispatcher, [1]) == []  # it takes nothing new, and so becomes empty
    dispatcher.remove(busy)
    assert given_to(dispatcher, [1]) == [(1, "suspect")]
    dispatcher.remove(suspect)
    assert given_to(dispatcher, [1]) == [(1, "new")]


def test_a_job_that_breaks_workers_by_its_arrival_is_found_too() -> None:
    dispatcher = Dispatcher(1)
    add(dispatcher, "arrival")
    for _ in range(4):
        assert given_to(dispatcher, [0]) == [(0, "arrival")]
        convicted = lose(dispatcher, 0)
    assert convicted == ["arrival"]
    assert given_to(dispatcher, [0]) == []


class Cluster:
    """Workers that run a few of their jobs at a time, and die of poison as soon as it is among these."""

    def __init__(self, generator: random.Random, workers: int, at_once: int) -> None:
        self.random, self.workers, self.at_once = generator, workers, at_once
        self.dispatcher = Dispatcher(workers)
        self.up: dict[int, list[Pending]] = {worker: [] for worker in range(workers)}  # what those have that are ready
        self.poison: set[str] = set()
        self.done: list[str] = []
        self.convicted: list[str] = []
        self.alone: Counter[str] = Counter()  # deaths of workers that held nothing else
        self.deaths = 0

    def assign(self) -> None:
        for worker, pending in self.dispatcher.assign(sorted(self.up), more_to_come=len(self.up) < self.workers):
            self.up[worker].append(pending)
        for held in self.up.values():
            assert len({pending.suspect for pending in held}) <= 1, "suspects were given company"

    def finish(self, worker: int, pending: Pending) -> None:
        self.up[worker].remove(pending)
        self.dispatcher.remove(pending)
        self.done.append(pending.id)
        self.assign()

    def kill(self, worker: int) -> bool:
        """Kill a worker, unless it is dead already."""
        held = self.up.pop(worker, None)
        if held is not None:
            self.deaths += 1
            self.alone.update(pending.id for pending in held if len(held) == 1)
            self.convicted += lose(self.dispatcher, worker)
        self.assign()
        return held is not None

    def revive(self, worker: int) -> None:
        self.up.setdefault(worker, [])
        self.assign()

    def step(self) -> None:
        """Something happens to one worker: it comes back, it dies of what it runs, or a job of its is done."""
        worker = self.random.randrange(self.workers)
        if worker not in self.up:
            self.revive(worker)
        elif running := self.up[worker][: self.at_once]:
            for pending in running:
                pending.begun = True
            if self.poison.isdisjoint(pending.id for pending in running):
                self.finish(worker, self.random.choice(running))
            else:
                self.kill(worker)


@settings(max_examples=400, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    workers=st.integers(1, 4),
    at_once=st.integers(1, 8),
    jobs=st.integers(1, 60),
    poison=st.integers(0, 4),
    kills=st.sampled_from([0, 20]),
)
def test_poison_is_convicted_and_nobody_else_that_was_not_hit_twice_alone(
    seed: int, workers: int, at_once: int, jobs: int, poison: int, kills: int
) -> None:
    generator = random.Random(seed)
    cluster = Cluster(generator, workers, at_once)
    names = [f"job {index}" for index in range(jobs)]
    cluster.poison = set(generator.sample(names, min(poison, jobs)))
    later = list(names)
    steps = killed = 0
    while len(cluster.done) + len(cluster.convicted) < jobs:
        if later and generator.random() < 0.5:
            add(cluster.dispatcher, later.pop(0), generator.random())
            cluster.assign()
        cluster.step()
        if killed < kills and generator.random() < 0.1:
            killed += cluster.kill(generator.randrange(workers))
        steps += 1
        assert steps < 400 * (jobs + 1), "it goes round in circles"
    convicted = set(cluster.convicted)
    assert sorted([*cluster.done, *convicted]) == sorted(names)
    assert all(cluster.alone[name] >= 2 for name in convicted)
    assert cluster.poison <= convicted
    if not killed:
        assert convicted == cluster.poison
        assert cluster.deaths <= 4 * len(cluster.poison)
    assert cluster.dispatcher.suspects == 0
    assert all(cluster.dispatcher.outstanding(worker) == 0 for worker in range(workers))


def losses(kills: int, clients: int, seconds: Sequence[float], gap: float, workers: int = 1, seed: int = 0) -> int:
    """How many requests are convicted by `kills` kills of workers, each at a moment uniform in [0, `gap`] seconds after
    the last. The `clients` always have one request each in flight; what it takes alone is drawn from `seconds`. A
    worker shares its processor evenly among what it holds: k requests together take as long as one after the other,
    which is no better than a real one. It comes back at once."""
    generator = random.Random(seed)
    cluster = Cluster(generator, workers, clients)
    names = itertools.count()
    left: dict[str, float] = {}  # seconds of computing left
    for _ in range(kills):
        until_kill = generator.uniform(0.0, gap)
        while True:
            while len(left) < clients:
                new = add(cluster.dispatcher, str(next(names)), generator.choice(seconds))
                left[new.id] = new.cost
            cluster.assign()
            first = {worker: min(held, key=lambda one: left[one.id]) for worker, held in cluster.up.items() if held}
            pause, worker = min((left[one.id] * len(cluster.up[worker]), worker) for worker, one in first.items())
            for held in cluster.up.values():
                for pending in held:
                    pending.begun = True
                    left[pending.id] -= min(pause, until_kill) / len(held)
            if pause >= until_kill:
                break
            until_kill -= pause
            cluster.finish(worker, first[worker])
            del left[first[worker].id]
        victim = generator.randrange(workers)
        hit = cluster.up[victim]
        cluster.kill(victim)
        cluster.revive(victim)
        for pending in hit:
            left[pending.id] = pending.cost
            if pending.convicted:
                del left[pending.id]
    return len(cluster.convicted)


def test_one_client_is_hit_as_often_as_chance_has_it() -> None:
    """Its only request is always alone. After a kill that convicts nobody the next one convicts when it comes before
    the request is through, p = 0.2 of the time; so the rate r of convictions is p (1 - r)."""
    kills = 20_000
    assert losses(kills, 1, [1.0], 5.0) / kills == pytest.approx(0.2 / 1.2, rel=0.1)


@pytest.mark.parametrize("clients", [4, 12, 64])
@pytest.mark.parametrize("workers", [1, 2])
def test_twenty_kills_that_leave_suspects_their_time_cost_next_to_nothing(clients: int, workers: int) -> None:
    """Requests of 0.2 to 0.8 seconds, 0 to 20 seconds between two kills."""
    assert losses(1000, clients, [0.2, 0.4, 0.8], 20.0, workers) / 50 < 0.5


def test_three_kills_lose_nobody_who_had_company() -> None:
    """Such a request dies with others, with some of them, and then twice alone."""
    assert [losses(3, 16, [5.0], 5.0, seed=seed) for seed in range(300)] == [0] * 300


def test_the_estimate_of_work_grows_with_everything_that_is_work() -> None:
    def cost(best_of: int = 1, steps: int = 8, tokens: int = 16, **guided: int) -> float:
        guidance = GuidanceParams("entrgi", **guided) if guided else GuidanceParams()
        return cost_of(Job("a", (1, 2), SamplingParams(tokens, best_of=best_of), DiffusionParams(steps), guidance))

    assert cost() == 8 * 18
    assert cost(best_of=4) == 4 * cost()
    assert cost(steps=16) == 2 * cost()
    assert cost(steps=10_000) == cost(steps=16)  # a canvas of 16 takes no more than 16
    assert cost(gradient_steps=3) == 4 * cost()
    short = cost_of(Score("s", "rm", [((Message("user", "hi"),), "yes")]))
    assert cost_of(Score("s", "rm", [((Message("user", "hi"),), "yes " * 100)])) > 10 * short
    assert short == pytest.approx(1 + 5 / 4)

"""Who gets which job, and who is blamed for a worker's death: properties over random lives of pretended workers."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

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


def test_nothing_is_given_to_a_worker_that_is_not_ready() -> None:
    dispatcher = Dispatcher(2)
    add(dispatcher, "a")
    assert given_to(dispatcher, []) == []
    assert given_to(dispatcher, [1]) == [(1, "a")]


def lose(dispatcher: Dispatcher, worker: int) -> list[str]:
    """A worker dies; who is convicted of it."""
    return [pending.id for pending in dispatcher.lost(worker) if pending.convicted]


def test_queued_jobs_of_a_dead_worker_move_at_once_and_running_ones_run_apart() -> None:
    dispatcher = Dispatcher(2)
    jobs = {name: add(dispatcher, name) for name in ("running 1", "running 2", "queued 1", "queued 2")}
    given_to(dispatcher, [0])
    busy = add(dispatcher, "busy", 9.0)
    given_to(dispatcher, [1])
    for name in ("running 1", "running 2"):
        jobs[name].begun = True
    assert dispatcher.suspects == 0
    assert lose(dispatcher, 0) == []
    assert dispatcher.suspects == 2
    assert given_to(dispatcher, [1], more_to_come=True) == [(1, "queued 1"), (1, "queued 2")]
    # The dead worker's successor takes one group of suspects (here of one), and nothing else until that is done.
    add(dispatcher, "new")
    assert given_to(dispatcher, [0, 1]) == [(0, "running 1"), (1, "new")]
    assert dispatcher.suspects == 2  # waiting or running
    dispatcher.remove(jobs["running 1"])
    assert given_to(dispatcher, [0, 1]) == [(0, "running 2")]
    dispatcher.remove(jobs["running 2"])
    assert dispatcher.suspects == 0
    add(dispatcher, "newer")
    assert given_to(dispatcher, [0, 1]) == [(0, "newer")]
    assert not busy.suspect


def test_nine_suspects_run_in_threes_and_those_of_a_group_that_dies_alone() -> None:
    dispatcher = Dispatcher(1)
    jobs = [add(dispatcher, str(index)) for index in range(9)]
    given_to(dispatcher, [0])
    for pending in jobs:
        pending.begun = True
    assert lose(dispatcher, 0) == []
    add(dispatcher, "new")

    def next_group() -> list[str]:
        return [name for _, name in given_to(dispatcher, [0])]

    assert next_group() == ["0", "1", "2"]
    assert next_group() == []
    assert lose(dispatcher, 0) == []  # none of them was alone
    for expected in (["3", "4", "5"], ["6", "7", "8"], ["0"], ["1"]):
        assert next_group() == expected
        if expected != ["1"]:
            for name in expected:
                dispatcher.remove(jobs[int(name)])
    assert lose(dispatcher, 0) == []  # once alone
    assert next_group() == ["2"]
    dispatcher.remove(jobs[2])
    assert next_group() == ["1"]
    assert lose(dispatcher, 0) == ["1"]
    assert next_group() == ["new"]


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
    deaths = 0
    convicted: list[str] = []
    while not convicted:
        assert given_to(dispatcher, [0]) == [(0, "arrival")]
        convicted = lose(dispatcher, 0)
        deaths += 1
        assert deaths < 10
    assert given_to(dispatcher, [0]) == []


@dataclass
class Cluster:
    """Workers that run a few of their jobs at a time, and die of poison as soon as it is among these."""

    random: random.Random
    workers: int
    at_once: int
    dispatcher: Dispatcher = field(init=False)
    up: dict[int, list[Pending]] = field(default_factory=dict)  # ready workers -> what they have
    poison: set[str] = field(default_factory=set)
    done: list[str] = field(default_factory=list)
    convicted: list[Pending] = field(default_factory=list)
    alone: Counter[str] = field(default_factory=Counter)  # deaths of workers that held nothing else
    deaths: int = 0

    def __post_init__(self) -> None:
        self.dispatcher = Dispatcher(self.workers)
        self.up = {worker: [] for worker in range(self.workers)}

    def assign(self) -> None:
        for worker, pending in self.dispatcher.assign(sorted(self.up), more_to_come=len(self.up) < self.workers):
            self.up[worker].append(pending)
        for held in self.up.values():
            assert len({pending.suspect for pending in held}) <= 1, "suspects were given company"

    def step(self) -> None:
        """Something happens to one worker: it comes back, it dies of what it runs, or a job of its is done."""
        worker = self.random.randrange(self.workers)
        if worker not in self.up:
            self.up[worker] = []
        elif held := self.up[worker]:
            running = held[: self.at_once]
            for pending in running:
                pending.begun = True
            if any(pending.id in self.poison for pending in running):
                self.kill(worker)
            else:
                pending = self.random.choice(running)
                held.remove(pending)
                self.dispatcher.remove(pending)
                self.done.append(pending.id)
        self.assign()

    def kill(self, worker: int) -> bool:
        held = self.up.pop(worker, None)
        if held is not None:
            self.deaths += 1
            self.alone.update(pending.id for pending in held if len(held) == 1)
            self.convicted += [pending for pending in self.dispatcher.lost(worker) if pending.convicted]
        self.assign()
        return held is not None


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
    convicted = {pending.id for pending in cluster.convicted}
    assert sorted([*cluster.done, *convicted]) == sorted(names)
    assert all(cluster.alone[name] >= 2 for name in convicted)
    assert cluster.poison <= convicted
    if not killed:
        assert convicted == cluster.poison
        assert cluster.deaths <= 4 * len(cluster.poison)
    assert cluster.dispatcher.suspects == 0
    assert all(cluster.dispatcher.outstanding(worker) == 0 for worker in range(workers))


def test_the_estimate_of_work_grows_with_everything_that_is_work() -> None:
    def cost(best_of: int = 1, steps: int = 8, tokens: int = 16, gradient_steps: int | None = None) -> float:
        guidance = (
            GuidanceParams() if gradient_steps is None else GuidanceParams("entrgi", gradient_steps=gradient_steps)
        )
        return cost_of(Job("a", (1, 2), SamplingParams(tokens, best_of=best_of), DiffusionParams(steps), guidance))

    assert cost() == 8 * 18
    assert cost(best_of=4) == 4 * cost()
    assert cost(steps=16) == 2 * cost()
    assert cost(steps=10_000) == cost(steps=16)  # a canvas of 16 takes no more than 16
    assert cost(gradient_steps=3) == 4 * cost()
    short = cost_of(Score("s", "rm", [((Message("user", "hi"),), "yes")]))
    assert cost_of(Score("s", "rm", [((Message("user", "hi"),), "yes " * 100)])) > 10 * short
    assert short == pytest.approx(1 + 5 / 4)

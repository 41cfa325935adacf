"""One job's trouble is its own: whatever raises while a job starts, ends or is refused, its neighbours finish with
their usual tokens, nothing stays queued, and no event of the pass is lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from server.budget import Budget
from server.types import Job
from server.wire.messages import Event, Failed, Finished
from server.worker.runner import Runner
from tests.support.jobs import make_job
from tests.support.models import diffusion, reward

LOADED, REWARD = diffusion("dream"), reward("dream")
POISON = "a conversation that nobody can read"


class Fragile:
    """A reward model that breaks on the poison: while it is read before the first step (`prefill`), or in the final
    score; `error` is what it raises."""

    def __init__(self, breaks: str, error: Exception) -> None:
        self.breaks, self.error = breaks, error
        self.poison = tuple(REWARD.tokenizer.encode(POISON))

    def __getattr__(self, name: str) -> Any:
        return getattr(REWARD, name)

    def _look(self, where: str, ids: Any) -> None:
        text = tuple(ids)
        size = len(self.poison)
        if where == self.breaks and any(text[i : i + size] == self.poison for i in range(len(text))):
            raise self.error

    def prefill(self, ids: Any) -> Any:
        self._look("prefill", ids)
        return REWARD.prefill(ids)

    def score(self, sequences: Any) -> torch.Tensor:
        for ids in sequences:
            self._look("score", ids)
        return REWARD.score(sequences)


def guided(name: str, seed: int, prompt: str = "Hi", **values: Any) -> Job:
    return make_job(name, prompt, seed=seed, method="entrgi", gradient_steps=1, **values)


@pytest.fixture(scope="module")
def usual() -> dict[str, Any]:
    """What the innocent jobs give without company."""
    runner = Runner(LOADED, {"rm": REWARD})
    for job in innocents():
        runner.add(job, now=0.0)
    return {name: event.result.trajectories for name, event in endings(runner).items() if isinstance(event, Finished)}


def innocents() -> list[Job]:
    return [guided("one", 1, best_of=2), make_job("two", seed=2), guided("three", 3)]


def endings(runner: Runner, first: list[Event] | None = None) -> dict[str, Event]:
    """The last event of each job, until there is nothing to do. Each job has one."""
    ended: dict[str, Event] = {}
    for event in all_events(runner, first or []):
        if isinstance(event, Finished | Failed):
            assert event.job_id not in ended
            ended[event.job_id] = event
    assert (runner.stats.running, runner.stats.waiting) == (0, 0)
    return ended


def all_events(runner: Runner, first: list[Event]) -> Iterator[Event]:
    yield from first
    steps = 0
    while runner.has_work:
        yield from runner.step()
        steps += 1
        assert steps < 100, "the loop does not come to rest"


@pytest.mark.parametrize("budget", [Budget(), Budget(trajectories=2)], ids=["all at once", "two at a time"])
@pytest.mark.parametrize("error", [RuntimeError("secret of the model"), IndexError("index out of range")], ids=repr)
def test_start_that_raises_fails_its_job_alone(usual: dict[str, Any], budget: Budget, error: Exception) -> None:
    """Several such jobs before, between and after others, one that was queued past its deadline in the same pass, and
    one past its deadline that would raise as well."""
    now = 0.0
    runner = Runner(LOADED, {"rm": Fragile("prefill", error)}, budget=budget, clock=lambda: now)
    one, two, three = innocents()
    bad = [guided(f"bad-{index}", 50 + index, POISON, best_of=1 + index) for index in range(3)]
    late = [replace(make_job("late"), deadline=5.0), replace(guided("late and bad", 9, POISON), deadline=5.0)]
    for job in (bad[0], one, bad[1], *late, two, bad[2], three):
        runner.add(job, now=0.0)
    now = 10.0
    ended = endings(runner, runner.step())
    assert {name: event.kind for name, event in ended.items() if isinstance(event, Failed)} == {
        "bad-0": "internal", "bad-1": "internal", "bad-2": "internal", "late": "deadline", "late and bad": "deadline",
    }  # fmt: skip
    assert not any("secret" in event.message for event in ended.values() if isinstance(event, Failed))
    assert {name: event.result.trajectories for name, event in ended.items() if isinstance(event, Finished)} == usual


def test_start_that_raises_leaves_the_running_jobs_alone(usual: dict[str, Any]) -> None:
    runner = Runner(LOADED, {"rm": Fragile("prefill", ValueError("broken"))})
    for job in innocents():
        runner.add(job, now=0.0)
    first = runner.step()
    runner.add(guided("bad", 7, POISON), now=0.0)
    ended = endings(runner, first)
    assert {name for name, event in ended.items() if isinstance(event, Failed)} == {"bad"}
    assert {name: event.result.trajectories for name, event in ended.items() if isinstance(event, Finished)} == usual


@pytest.mark.parametrize("error", [ValueError("broken"), MemoryError()], ids=repr)
def test_an_end_that_raises_fails_its_job_alone(usual: dict[str, Any], error: Exception) -> None:
    runner = Runner(LOADED, {"rm": Fragile("score", error)})
    for job in (guided("bad", 7, POISON, max_tokens=4), *innocents(), make_job("worse", POISON, reward_models=("rm",))):
        runner.add(job, now=0.0)
    ended = endings(runner)
    kind = "out_of_memory" if isinstance(error, MemoryError) else "internal"
    assert {name: event.kind for name, event in ended.items() if isinstance(event, Failed)} == {
        "bad": kind,
        "worse": kind,
    }
    assert {name: event.result.trajectories for name, event in ended.items() if isinstance(event, Finished)} == usual
    # Memory that runs out is tried a second time, in smaller pieces, and counted both times.
    assert runner.stats.out_of_memory == (4 if kind == "out_of_memory" else 0)


class Broken:
    """A diffusion model that breaks in its n-th forward."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __getattr__(self, name: str) -> Any:
        return getattr(LOADED.model, name)

    def masked_hidden(self, *arguments: Any) -> torch.Tensor:
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("something else")
        return LOADED.model.masked_hidden(*arguments)


def test_a_step_that_raises_ends_those_that_took_part_and_keeps_the_pass_s_other_events(usual: dict[str, Any]) -> None:
    now = 0.0
    runner = Runner(
        replace(LOADED, model=Broken(at=2)),  # type: ignore[arg-type]
        {"rm": REWARD},
        budget=Budget(trajectories=1),
        clock=lambda: now,
    )
    one, two, three = innocents()
    for job in (two, one, replace(make_job("late"), deadline=5.0), three):
        runner.add(job, now=0.0)
    first = runner.step()
    now = 10.0
    second = runner.step()
    assert [(event.job_id, event.kind) for event in second if isinstance(event, Failed)] == [
        ("late", "deadline"),
        ("two", "internal"),
    ]
    ended = endings(runner, [*first, *second])
    assert runner.stats.out_of_memory == 0
    finished = {name: event.result.trajectories for name, event in ended.items() if isinstance(event, Finished)}
    assert finished == {name: trajectories for name, trajectories in usual.items() if name != "two"}


def test_begin_is_told_of_each_job_once_before_anything_is_computed() -> None:
    told: list[str] = []
    runner = Runner(LOADED, {"rm": Fragile("prefill", ValueError("broken"))})
    runner.begin = told.append
    for job in (guided("bad", 7, POISON), *innocents()):
        runner.add(job, now=0.0)
    endings(runner)
    assert Counter(told) == Counter(["bad", "one", "two", "three"])

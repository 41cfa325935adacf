"""One job's trouble is its own: whatever raises while a job starts, ends or is refused, its neighbours finish with
their usual tokens, nothing stays queued, and no event of the pass is lost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from server.budget import Budget
from server.models.loading import LoadedDiffusionModel
from server.types import Job
from server.wire.messages import Event, Failed, Finished, Timed
from server.worker.runner import Runner
from tests.support.jobs import make_job
from tests.support.models import Around, Watched, diffusion, reward

LOADED, REWARD = diffusion("dream"), reward("dream")
POISON = "a conversation that nobody can read"


class Fragile(Around):
    """A reward model that breaks on the poison: while it is read before the first step (`prefill`), or in the final
    score; `error` is what it raises."""

    def __init__(self, breaks: str, error: Exception) -> None:
        super().__init__(REWARD)
        self.breaks, self.error = breaks, error
        self.poison = tuple(REWARD.tokenizer.encode(POISON))

    def _look(self, where: str, ids: Any) -> None:
        text, size = tuple(ids), len(self.poison)
        if where == self.breaks and any(text[i : i + size] == self.poison for i in range(len(text))):
            raise self.error

    def prefill_all(self, sequences: Any) -> Any:
        for ids in sequences:
            self._look("prefill", ids)
        return REWARD.prefill_all(sequences)

    def score(self, sequences: Any) -> torch.Tensor:
        for ids in sequences:
            self._look("score", ids)
        return REWARD.score(sequences)


def guided(name: str, seed: int, prompt: str = "Hi", **values: Any) -> Job:
    return make_job(name, prompt, seed=seed, method="entrgi", gradient_steps=1, **values)


def innocents() -> list[Job]:
    return [guided("one", 1, best_of=2), make_job("two", seed=2), guided("three", 3)]


def test_some_steps_of_a_timed_job_are_reported_with_what_their_parts_took() -> None:
    jobs = [guided("timed", 1, best_of=2, max_tokens=32, timed=True), make_job("other", seed=2, max_tokens=32)]
    runner, times = start(jobs), []
    while runner.has_work:
        times += [event for event in runner.step() if isinstance(event, Timed)]
    assert {each.job_id for each in times} == {"timed"}
    assert [each.step for each in times] == list(range(1, 32, 2))  # step 0 reveals nothing
    for each in times:
        assert each.trajectories == 3
        assert 0 < each.reward < each.guidance < each.guidance + each.model < each.seconds


def start(jobs: list[Job], reward_model: Any = REWARD, loaded: LoadedDiffusionModel = LOADED, **options: Any) -> Runner:
    """A runner with these jobs queued."""
    runner = Runner(loaded, {"rm": reward_model}, **options)
    for job in jobs:
        runner.add(job, now=0.0)
    return runner


def endings(runner: Runner, *earlier: Event) -> tuple[dict[str, Any], dict[str, str]]:
    """Trajectories of the jobs that finish and kinds of the failures, by job, until there is nothing to do, and of
    events before that. Each job ends once."""
    events, steps = list(earlier), 0
    while runner.has_work:
        events += runner.step()
        steps += 1
        assert steps < 100, "the loop does not come to rest"
    assert (runner.stats.running, runner.stats.waiting) == (0, 0)
    assert not any("secret" in event.message for event in events if isinstance(event, Failed))
    finished = {event.job_id: event.result.trajectories for event in events if isinstance(event, Finished)}
    failed = {event.job_id: event.kind for event in events if isinstance(event, Failed)}
    assert len(finished) + len(failed) == sum(isinstance(event, Finished | Failed) for event in events)
    assert not finished.keys() & failed.keys()
    return finished, failed


@pytest.fixture(scope="module")
def usual() -> dict[str, Any]:
    """What the innocent jobs give without company."""
    return endings(start(innocents()))[0]


@pytest.mark.parametrize("budget", [Budget(), Budget(trajectories=2)], ids=["all at once", "two at a time"])
@pytest.mark.parametrize("error", [RuntimeError("secret of the model"), IndexError("index out of range")], ids=repr)
def test_start_that_raises_fails_its_job_alone(usual: dict[str, Any], budget: Budget, error: Exception) -> None:
    """Several such jobs before, between and after others, one that was queued past its deadline in the same pass, and
    one past its deadline that would raise as well."""
    now = 0.0
    one, two, three = innocents()
    bad = [guided(f"bad-{index}", 50 + index, POISON, best_of=1 + index) for index in range(3)]
    late = [replace(make_job("late"), deadline=5.0), replace(guided("late and bad", 9, POISON), deadline=5.0)]
    queue = [bad[0], one, bad[1], *late, two, bad[2], three]
    runner = start(queue, Fragile("prefill", error), budget=budget, clock=lambda: now)
    now = 10.0
    deadlines = {"late": "deadline", "late and bad": "deadline"}
    assert endings(runner) == (usual, {"bad-0": "internal", "bad-1": "internal", "bad-2": "internal", **deadlines})


def test_start_that_raises_leaves_the_running_jobs_alone(usual: dict[str, Any]) -> None:
    runner = start(innocents(), Fragile("prefill", ValueError("broken")))
    first = runner.step()
    runner.add(guided("bad", 7, POISON), now=0.0)
    assert endings(runner, *first) == (usual, {"bad": "internal"})


@pytest.mark.parametrize("error", [ValueError("broken"), MemoryError()], ids=repr)
def test_an_end_that_raises_fails_its_job_alone(usual: dict[str, Any], error: Exception) -> None:
    bad, worse = guided("bad", 7, POISON, max_tokens=4), make_job("worse", POISON, reward_models=("rm",))
    runner = start([bad, *innocents(), worse], Fragile("score", error))
    kind = "out_of_memory" if isinstance(error, MemoryError) else "internal"
    assert endings(runner) == (usual, {"bad": kind, "worse": kind})
    # Memory that runs out is tried a second time, in smaller pieces, and counted both times.
    assert runner.stats.out_of_memory == (4 if kind == "out_of_memory" else 0)


def test_a_step_that_raises_ends_those_that_took_part_and_keeps_the_pass_s_other_events(usual: dict[str, Any]) -> None:
    now = 0.0
    one, two, three = innocents()

    def second_forward(what: str, sizes: list[int]) -> bool:
        if what == "forward" and len(sizes) == 2:
            raise RuntimeError("something else")
        return False

    broken: Any = Watched(LOADED.model, second_forward)
    queue = [two, one, replace(make_job("late"), deadline=5.0), three]
    options = {"budget": Budget(trajectories=1), "clock": lambda: now}
    runner = start(queue, loaded=replace(LOADED, model=broken), **options)
    first = runner.step()
    now = 10.0
    second = runner.step()
    assert endings(runner, *first, *second) == (
        {name: trajectories for name, trajectories in usual.items() if name != "two"},
        {"late": "deadline", "two": "internal"},
    )
    assert [event.job_id for event in second if isinstance(event, Failed)] == ["late", "two"]
    assert runner.stats.out_of_memory == 0


def test_what_fails_is_prepared_apart_only_where_there_are_others(caplog: pytest.LogCaptureFixture) -> None:
    for others, told in ([], 0), (innocents(), 1):
        endings(start([guided("bad", 7, POISON), *others], Fragile("prefill", ValueError("broken"))))
        assert sum("together failed" in record.getMessage() for record in caplog.records) == told


def test_begin_is_told_of_each_job_once_before_anything_is_computed() -> None:
    told: list[str] = []
    runner = start([guided("bad", 7, POISON), *innocents()], Fragile("prefill", ValueError("broken")))
    runner.begin = told.append
    endings(runner)
    assert sorted(told) == ["bad", "one", "three", "two"]


def test_conversations_of_jobs_that_arrive_together_are_run_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """And equal ones once."""
    passes: list[int] = []
    extend = REWARD.extend

    def counted(layout: Any, embeds: torch.Tensor) -> Any:
        passes.append(len(layout.lengths))
        return extend(layout, embeds)

    monkeypatch.setattr(REWARD, "extend", counted)
    jobs = [guided(f"job-{number}", number, f"Hi number {number % 14}") for number in range(16)]
    runner = start(jobs)
    runner.step()
    assert passes == [14]
    together, _ = endings(runner)
    alone = {name: trajectories for job in jobs for name, trajectories in endings(start([job]))[0].items()}
    assert together == alone

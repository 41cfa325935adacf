"""Jobs with scorers outside of the worker: they ask, wait without holding anything or stopping others, and go on."""

from __future__ import annotations

from typing import Any

import pytest

from server.budget import Budget
from server.types import Job, JobResult, Resampling, WeightedReward
from server.wire.messages import Ask, Event, Failed, Finished, Judged, Started
from server.worker.runner import Runner
from tests.support.jobs import make_job
from tests.support.models import diffusion, reward, score_text

LOADED, REWARD = diffusion("dream"), reward("dream")
OUTSIDE = {"scorers": (WeightedReward("length", 2.0), WeightedReward("tests"))}


def start(*jobs: Job, **options: Any) -> Runner:
    runner = Runner(LOADED, {"rm": REWARD}, **options)
    for job in jobs:
        runner.add(job, now=0.0)
    return runner


def work(runner: Runner) -> list[Event]:
    """What happens until all that is here waits for outside scorers, or nothing is here."""
    events = []
    while runner.has_work:
        events += runner.step()
    return events


def only(kind: type[Event], events: list[Event]) -> Any:
    (event,) = [event for event in events if isinstance(event, kind)]
    return event


def lengths(ask: Ask) -> Judged:
    """What two scorers say of the texts of an Ask."""
    return Judged(ask.job_id, ask.step, {"length": [float(len(text)) for text in ask.texts], "tests": [1.0] * 3})


def bon(**values: Any) -> Job:
    return make_job("bon", method="bon", best_of=3, seed=3, temperature=1.0, **{**OUTSIDE, **values})


def test_final_texts_are_judged_outside_and_the_best_is_chosen_by_the_weighted_sum() -> None:
    runner = start(bon(reward_models=("rm",), response_prefix="Well, ", response_suffix="."))
    ask = only(Ask, work(runner))
    assert (ask.step, len(ask.texts), len(set(ask.texts))) == (-1, 3, 3)
    assert all(text.startswith("Well, ") and text.endswith(".") for text in ask.texts)
    runner.judged(lengths(ask))
    result: JobResult = only(Finished, work(runner)).result
    for one, text in zip(result.trajectories, ask.texts, strict=True):
        assert "Well, " + one.text + "." == text
        assert (one.rewards["length"], one.rewards["tests"]) == (len(text), 1.0)
        assert one.reward == pytest.approx(one.rewards["rm"] + 2.0 * len(text) + 1.0, abs=1e-9)
    best = max(result.trajectories, key=lambda one: one.reward or 0.0)
    assert result.chosen == (best.index,)


def test_a_parked_job_holds_up_nobody_and_answers_that_it_does_not_wait_for_are_ignored() -> None:
    runner = start(bon(reward_models=()), make_job("other", max_tokens=24))
    ask, events = None, list[Event]()
    while not any(isinstance(event, Finished) for event in events):
        events += runner.step()
        ask = next((event for event in events if isinstance(event, Ask)), None)
    assert ask is not None
    assert not runner.has_work
    assert (runner.stats.running, runner.stats.waiting) == (0, 0)
    for job_id, step in (("bon", 8), ("gone", -1)):
        runner.judged(Judged(job_id, step, {"length": [1.0] * 3, "tests": [1.0] * 3}))
        assert not runner.has_work
    runner.judged(lengths(ask))
    assert only(Finished, work(runner)).job_id == "bon"
    runner.judged(lengths(ask))
    assert not runner.has_work


@pytest.mark.parametrize("scores", [{"length": [1.0, 2.0], "tests": [1.0] * 3}, {"length": [1.0] * 4}])
def test_answers_that_do_not_fit_fail_their_job_alone(scores: dict[str, list[float]]) -> None:
    runner = start(bon(reward_models=()), make_job("other"))
    ask = only(Ask, work(runner))
    runner.judged(Judged(ask.job_id, ask.step, scores))
    assert only(Failed, work(runner)).job_id == "bon"


def test_past_the_deadline_rewards_are_missing_and_come_last() -> None:
    now = 0.0
    runner = start(bon(reward_models=("rm",), deadline=5.0), clock=lambda: now)
    ask = only(Ask, work(runner))
    now = 10.0
    assert not runner.has_work
    runner.judged(Judged(ask.job_id, ask.step, None))
    result = only(Finished, work(runner)).result
    assert [(one.reward, one.rewards["length"]) for one in result.trajectories] == [(None, None)] * 3
    assert all(one.rewards["rm"] is not None and one.finish_reason == "length" for one in result.trajectories)
    assert result.chosen == (0,)


def test_a_job_that_its_deadline_cuts_asks_nobody() -> None:
    now = 0.0
    runner = start(bon(reward_models=(), deadline=5.0, max_tokens=24), clock=lambda: now)
    runner.step()
    now = 10.0
    events = work(runner)
    assert not any(isinstance(event, Ask) for event in events)
    assert [one.reward for one in only(Finished, events).result.trajectories] == [None] * 3


@pytest.mark.parametrize("answered", [True, False])
def test_a_job_that_its_deadline_cuts_at_a_meeting_is_rewarded_for_its_final_texts(answered: bool) -> None:
    now = 0.0
    job = bon(reward_models=("rm",), resample=Resampling(every=4), deadline=5.0)
    runner = start(job, clock=lambda: now)
    ask = only(Ask, work(runner))
    assert ask.step == 4
    now = 10.0
    runner.judged(lengths(ask) if answered else Judged(ask.job_id, ask.step, None))
    result: JobResult = only(Finished, work(runner)).result
    for one in result.trajectories:
        final = score_text(REWARD, job.conversation, one.text)
        assert one.rewards == {"rm": pytest.approx(final, abs=1e-4), "length": None, "tests": None}
    assert (result.weights, result.resampled) == (None, ())


def test_a_job_begins_again_when_it_was_parked_at_a_meeting_but_starts_once() -> None:
    begun: list[str] = []
    runner = start(bon(reward_models=(), resample=Resampling(every=3)))
    runner.begin = begun.append
    events = work(runner)
    while (asks := [event for event in events if isinstance(event, Ask)])[-1].step >= 0:
        assert (runner.stats.running, runner.stats.waiting) == (0, 0)
        runner.judged(lengths(asks[-1]))
        events += work(runner)
    assert [ask.step for ask in asks] == [3, 6, -1]
    assert begun == ["bon"] * 3
    assert len([event for event in events if isinstance(event, Started)]) == 1
    assert runner.stats.effective_share.count == 2


def test_a_job_of_copies_of_a_finished_trajectory_ends_though_there_is_no_room_for_it() -> None:
    rule = Resampling(every=1, strength=100.0)
    job = bon(reward_models=(), resample=rule, algorithm="origin", max_tokens=4, steps=6)
    runner = start(job, budget=Budget(trajectories=3))
    over = list[int]()
    while not over:
        ask = only(Ask, work(runner))
        parked = runner.book.get("bon")
        assert parked is not None
        over = [index for index, trajectory in parked.running.items() if not trajectory.left]
        scores = {"length": [float(index in over[:1]) for index in range(3)], "tests": [0.0] * 3}
        if not over:
            runner.judged(Judged("bon", ask.step, scores))
    runner.add(make_job("other", n=3, best_of=3, max_tokens=24), now=0.0)
    runner.step()
    runner.judged(Judged("bon", ask.step, scores))
    assert only(Ask, runner.step()).step == -1
    assert runner.stats.running == 3


def test_a_cancelled_job_is_forgotten_while_it_waits() -> None:
    runner = start(bon(reward_models=()))
    work(runner)
    assert runner.cancel("bon")
    assert not runner.has_work

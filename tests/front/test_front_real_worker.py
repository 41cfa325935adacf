"""The engine around two real workers on a golden checkpoint in float64, where a seed fixes every token: jobs, scores,
workers that are killed, and requests that make them raise, run out of memory or die.

The same workers serve all tests of this file; those that lose one leave its successor to the next.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from server.methods import METHODS
from server.types import Job, Message, Resampling, WeightedReward
from server.wire.config import EngineConfig, RewardSource, WorkerConfig
from server.wire.messages import Event, Failed, Finished, Progress, Started
from tests.faults.faulty_worker import COMMAND, Fault
from tests.front.scripted import Driven, running, until
from tests.support.jobs import make_job
from tests.support.scorers import function

GOLDEN = Path(__file__).parents[1] / "golden" / "dream-tiny"
WORKER = WorkerConfig(
    str(GOLDEN / "dlm"),
    reward_models=(RewardSource("rm", str(GOLDEN / "rm")),),
    dtype="float64",
    device="cpu",
    threads=1,
    data_parallel=2,
    heartbeat_seconds=0.2,
    log_level="CRITICAL",
)
CROWD = 10

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[Driven]:
    async with running(EngineConfig(WORKER, worker_command=COMMAND, scorers=(function("length"),))) as engine:
        yield engine


def job_of(name: str, number: int = 4, **values: Any) -> Job:
    """Job `number`, whose method, sizes and prompt follow from that, but for what is given. Three trajectories are
    resampled, with an outside scorer's help."""
    method = [*METHODS][number % 5]
    best_of = 1 if method == "none" else 1 + number % 3
    defaults = {"seed": number, "method": method, "max_tokens": 8 + number % 5, "best_of": best_of}
    if best_of == 3:
        defaults |= {"resample": Resampling(every=3, strength=3.0), "scorers": (WeightedReward("length", 0.1),)}
    return make_job(name, **{**defaults, **({} if method == "none" else {"gradient_steps": 2}), **values})


async def crowd(engine: Driven, name: str, size: int = CROWD) -> list[Event]:
    jobs = [job_of(f"{name}-{number}", number) for number in range(size)]
    return await asyncio.gather(*map(engine.last, jobs))


def tokens(event: Event) -> list[tuple[int, ...]]:
    assert isinstance(event, Finished), event
    return [trajectory.token_ids for trajectory in event.result.trajectories]


async def until_all_ready(engine: Driven) -> None:
    await until(lambda: all(replica.ready for replica in engine.replicas), 120)


async def kill_all(engine: Driven) -> None:
    await until_all_ready(engine)
    for pid in engine.pids:
        os.kill(pid, signal.SIGKILL)


async def test_a_job_in_a_crowd_on_any_worker_gets_the_tokens_that_it_gets_alone(engine: Driven) -> None:
    together = await crowd(engine, "together")
    alone = [await engine.last(job_of(f"alone-{number}", number)) for number in range(CROWD)]
    assert list(map(tokens, together)) == list(map(tokens, alone))
    assert [event.result.chosen for event in together] == [event.result.chosen for event in alone]  # type: ignore[union-attr]
    steps = [replica.stats.denoising_steps for replica in engine.replicas]
    assert min(steps) > 0
    assert engine.stats.denoising_steps == sum(steps)
    assert (engine.in_flight, engine.stats.running) == (0, 0)


async def test_killed_workers_change_no_token_and_stream_none_twice(engine: Driven) -> None:
    long = {"max_tokens": 12, "best_of": 2, "stream_tokens": True, "stream_canvas": True}
    *undisturbed, right = [event async for event in engine.submit(job_of("calm", 7, **long))]
    for index, answer in enumerate(tokens(right)):  # what is streamed makes it up
        progress = [e for e in undisturbed if isinstance(e, Progress) and e.trajectory == index]
        assert sorted(pair for event in progress for pair in event.revealed) == [*enumerate(answer)]
    calm = await crowd(engine, "calm")
    await until_all_ready(engine)
    before = engine.restarts
    neighbours = asyncio.create_task(crowd(engine, "killed"))
    events = []
    async for event in engine.submit(job_of("calm", 7, **long)):
        events.append(event)
        if isinstance(event, Progress) and event.step == 6 and engine.restarts == before:
            await kill_all(engine)
            await until(lambda: engine.restarts > before)
    last = events.pop()
    assert tokens(last) == tokens(right)
    assert [type(event) for event in events].count(Started) == 1
    for index in range(2):  # events of different trajectories may come in another order
        ours, theirs = (
            [event for event in run if getattr(event, "trajectory", None) == index] for run in (events, undisturbed)
        )
        assert [(type(event), event.step) for event in ours] == [(type(event), event.step) for event in theirs]
        assert [e for e in ours if isinstance(e, Progress)] == [e for e in theirs if isinstance(e, Progress)]
    assert list(map(tokens, await neighbours)) == list(map(tokens, calm))
    assert engine.in_flight == 0


@pytest.mark.parametrize(("fault", "kind"), [(Fault.RAISE, "internal"), (Fault.EXHAUST_MEMORY, "out_of_memory")])
async def test_an_error_in_one_batch_does_not_take_later_ones(engine: Driven, fault: Fault, kind: str) -> None:
    await until_all_ready(engine)
    undisturbed = await crowd(engine, f"{kind}-before")
    workers = engine.pids
    bad = asyncio.create_task(engine.last(make_job(kind, seed=fault)))
    neighbours = await crowd(engine, f"{kind}-neighbour")
    last = await bad
    assert isinstance(last, Failed)
    assert last.kind == kind
    for neighbour, calm in zip(neighbours, undisturbed, strict=True):
        assert isinstance(neighbour, Failed) or tokens(neighbour) == tokens(calm)
    later = await crowd(engine, f"{kind}-later")
    assert list(map(tokens, later)) == list(map(tokens, undisturbed))
    assert engine.pids == workers


async def test_scores_among_running_jobs_are_the_recorded_rewards(engine: Driven) -> None:
    recorded = json.loads((GOLDEN / "units.json").read_text())["scores"]
    items = [((Message("user", entry["prompt"]),), entry["response"]) for entry in recorded]
    busy = asyncio.create_task(crowd(engine, "busy"))
    together, *apart = await asyncio.gather(engine.scores(items, "rm"), *(engine.scores([one], "rm") for one in items))
    assert together == pytest.approx([entry["reward"] for entry in recorded], abs=1e-5)
    assert [score for (score,) in apart] == pytest.approx(together, abs=1e-9)
    await busy
    assert await engine.scores([], "rm") == []


async def test_what_was_done_is_counted_when_the_answer_is_there(engine: Driven) -> None:
    before = engine.stats
    job = job_of("only", 3)
    last = await engine.last(job)
    assert isinstance(last, Finished)
    after = engine.stats
    assert after.committed_tokens - before.committed_tokens == job.sampling.max_tokens * job.sampling.best_of
    calls = after.model_forward_seconds.count - before.model_forward_seconds.count
    assert calls == last.result.model_calls
    assert after.reward_forward_seconds.total > before.reward_forward_seconds.total

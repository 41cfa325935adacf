"""The engine around the real worker on golden checkpoints in float64, where a seed fixes every token.

One worker serves all tests of this file; those that kill it leave its successor to the next.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from server.errors import InvalidRequest
from server.front.engine import Engine
from server.methods import METHODS
from server.types import (
    DiffusionParams,
    GuidanceParams,
    Job,
    JobResult,
    Message,
    SamplingParams,
    WeightedReward,
)
from server.wire.config import EngineConfig, WorkerConfig
from server.wire.messages import Canvas, Event, Failed, Finished, Progress

GOLDEN = Path(__file__).parents[1] / "golden" / "dream-tiny"
CONFIG = EngineConfig(
    WorkerConfig(
        str(GOLDEN / "dlm"),
        reward_models={"rm": str(GOLDEN / "rm")},
        dtype="float64",
        device="cpu",
        threads=1,
        heartbeat_seconds=0.2,
        log_level="WARNING",
    ),
    spare_worker=False,
)
CONVERSATION = (Message("user", "Hi"),)

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[Engine]:
    engine = Engine(CONFIG)
    await engine.start()
    yield engine
    await engine.stop()


def make_job(name: str, seed: int = 0, method: str = "entrgi", **changes: object) -> Job:
    fields: dict[str, object] = {
        "max_tokens": 8 + seed % 5,
        "steps": 6 + seed % 4,
        "best_of": 1 if method == "none" else 1 + seed % 3,
        "stream_tokens": False,
        "stream_canvas": False,
        "gradient_steps": 2,
        "deadline": None,
    } | changes
    return Job(
        name,
        prompt_ids=tuple(5 + (seed * 7 + index) % 400 for index in range(4 + seed % 3)),
        sampling=SamplingParams(
            fields["max_tokens"],  # type: ignore[arg-type]
            seed=seed,
            best_of=fields["best_of"],  # type: ignore[arg-type]
        ),
        diffusion=DiffusionParams(fields["steps"]),  # type: ignore[arg-type]
        guidance=GuidanceParams(
            method,
            () if method == "none" else (WeightedReward("rm"),),
            gradient_steps=fields["gradient_steps"],  # type: ignore[arg-type]
        ),
        conversation=CONVERSATION,
        deadline=fields["deadline"],  # type: ignore[arg-type]
        stream_tokens=fields["stream_tokens"],  # type: ignore[arg-type]
        stream_canvas=fields["stream_canvas"],  # type: ignore[arg-type]
    )


async def run(engine: Engine, job: Job) -> JobResult:
    result, _ = await run_with_events(engine, job)
    return result


async def run_with_events(engine: Engine, job: Job) -> tuple[JobResult, list[Event]]:
    events = [event async for event in engine.submit(job)]
    last = events[-1]
    assert isinstance(last, Finished), last
    return last.result, events


def tokens(result: JobResult) -> list[tuple[int, ...]]:
    return [trajectory.token_ids for trajectory in result.trajectories]


async def until_ready(engine: Engine) -> None:
    async with asyncio.timeout(120):
        while not engine.ready:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_a_job_in_a_crowd_gets_the_tokens_that_it_gets_alone(engine: Engine) -> None:
    jobs = [make_job(f"crowd-{seed}", seed, [*METHODS][seed % 5]) for seed in range(15)]
    together = await asyncio.gather(*[run(engine, job) for job in jobs])
    for job, crowded in zip(jobs, together, strict=True):
        alone = await run(engine, job)
        assert tokens(alone) == tokens(crowded)
        assert alone.chosen == crowded.chosen
    assert engine.stats.jobs_in_flight == 0
    assert engine.stats.runner.running == 0


async def test_streamed_tokens_make_up_the_answer(engine: Engine) -> None:
    job = make_job("stream", 2, stream_tokens=True, stream_canvas=True)
    result, events = await run_with_events(engine, job)
    canvases = [[-1] * job.sampling.max_tokens for _ in range(job.sampling.best_of)]
    for event in events:
        match event:
            case Progress(trajectory=index, revealed=revealed):
                for position, token in revealed:
                    assert canvases[index][position] == -1
                    canvases[index][position] = token
            case Canvas(trajectory=index, token_ids=token_ids):
                assert token_ids == canvases[index]
            case _:
                continue
    assert [tuple(canvas) for canvas in canvases] == tokens(result)


async def test_a_killed_worker_changes_no_token_and_streams_none_twice(engine: Engine) -> None:
    job = make_job("killed", 7, max_tokens=12, steps=12, best_of=2, stream_tokens=True, stream_canvas=True)
    companion = make_job("companion", 3, "aps", max_tokens=16, steps=16, best_of=1)
    expected, undisturbed = await run_with_events(engine, job)
    expected_companion = await run(engine, companion)
    restarts = engine.stats.worker_restarts
    other = asyncio.create_task(run(engine, companion))
    events = []
    async for event in engine.submit(job):
        events.append(event)
        if isinstance(event, Progress) and event.step == 6 and engine.stats.worker_restarts == restarts:
            pid = engine.worker_pids[0]
            if engine.ready and pid is not None:
                os.kill(pid, signal.SIGKILL)
    assert engine.stats.worker_restarts == restarts + 1
    last = events.pop()
    assert isinstance(last, Finished)
    assert tokens(last.result) == tokens(expected)
    for index in range(2):  # events of different trajectories may come in another order
        ours = [event for event in events if getattr(event, "trajectory", None) == index]
        theirs = [event for event in undisturbed if getattr(event, "trajectory", None) == index]
        assert [(type(event), event.step) for event in ours] == [(type(event), event.step) for event in theirs]
        assert [e for e in ours if isinstance(e, Progress)] == [e for e in theirs if isinstance(e, Progress)]
    assert tokens(await other) == tokens(expected_companion)


async def test_a_cancelled_job_frees_its_place(engine: Engine) -> None:
    await until_ready(engine)
    stream = engine.submit(make_job("long", 1, max_tokens=60, steps=60, best_of=4, stream_tokens=True))
    while not isinstance(await anext(stream), Progress):
        continue
    await stream.aclose()
    await run(engine, make_job("short", 1))
    assert engine.stats.runner.running == 0
    assert engine.stats.runner.waiting == 0


async def test_a_deadline_in_the_middle_ends_the_run_with_what_is_there(engine: Engine) -> None:
    """However fast the machine is and however busy, one of these times ends in the middle."""
    for seconds in (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0):
        job = make_job("late", 1, max_tokens=200, steps=200, gradient_steps=8, deadline=time.time() + seconds)
        events = [event async for event in engine.submit(job)]
        if isinstance(events[-1], Finished):
            break
        assert events[-1].kind == "deadline"  # it passed before the work began
    result = events[-1].result
    assert {trajectory.stop_reason for trajectory in result.trajectories} == {"deadline"}
    assert {trajectory.finish_reason for trajectory in result.trajectories} == {"length"}
    assert result.model_calls < 200


async def test_scores_are_the_recorded_rewards(engine: Engine) -> None:
    recorded = json.loads((GOLDEN / "units.json").read_text())["scores"]
    items = [((Message("user", entry["prompt"]),), entry["response"]) for entry in recorded]
    one_call = await engine.score("rm", items)
    assert one_call == pytest.approx([entry["reward"] for entry in recorded], abs=1e-5)
    # Several calls at once, among running jobs, share packs and get the same.
    crowd = [asyncio.create_task(run(engine, make_job(f"busy-{seed}", seed))) for seed in range(4)]
    apart = await asyncio.gather(*[engine.score("rm", [item]) for item in items])
    assert [score for (score,) in apart] == pytest.approx(one_call, abs=1e-9)
    await asyncio.gather(*crowd)
    assert await engine.score("rm", []) == []


async def test_what_cannot_be_scored_is_refused_by_name(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="nothing-like-it"):
        await engine.score("nothing-like-it", [(CONVERSATION, "yes")])
    with pytest.raises(InvalidRequest, match="item 1 takes"):
        await engine.score("rm", [(CONVERSATION, "yes"), (CONVERSATION, "yes " * 4000)])


async def test_a_job_that_can_never_run_is_refused(engine: Engine) -> None:
    events = [event async for event in engine.submit(make_job("huge", max_tokens=5000, steps=1))]
    assert isinstance(events[-1], Failed)
    assert (events[-1].kind, events[-1].param) == ("invalid_request", "max_tokens")


async def test_what_was_done_is_counted_when_the_answer_is_there(engine: Engine) -> None:
    before = engine.stats.runner
    job = make_job("only", 3)
    result = await run(engine, job)
    after = engine.stats.runner
    revealed = job.sampling.max_tokens * job.sampling.best_of
    assert after.committed_tokens - before.committed_tokens == revealed
    assert after.model_forward_seconds.count - before.model_forward_seconds.count == result.model_calls
    assert after.reward_forward_seconds.total > before.reward_forward_seconds.total

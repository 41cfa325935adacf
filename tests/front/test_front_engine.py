"""The engine's face towards the HTTP layer, around a worker that follows a script: events, refusals, cancelling,
draining."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time

import pytest
import uvloop

from server.errors import (
    Draining,
    InvalidRequest,
    QueueFull,
)
from server.types import Message
from server.wire.messages import Canvas, Event, Failed, Finished, Progress, Started
from tests.front.scripted import (
    answer,
    configured,
    failure,
    in_flight,
    job,
    kill_worker,
    pid_of,
    restarts,
    running,
    scores,
    tokens,
    tokens_of,
    until,
)
from tests.front.scripted_worker import Do


async def test_many_jobs_at_once_each_get_their_own_answer() -> None:
    async with running() as engine:
        streams = [engine.submit(job(f"job-{seed}", seed=seed)) for seed in range(100)]
        assert await asyncio.gather(*map(tokens, streams)) == [tokens_of(seed, 4) for seed in range(100)]
        assert in_flight(engine) == 0
        assert engine.stats.denoising_steps == 400
        assert engine.stats.model_forward_seconds.count == 400


async def test_events_come_in_order_and_only_when_asked_for() -> None:
    async with running() as engine:
        quiet = [event async for event in engine.submit(job("quiet"))]
        assert [type(event) for event in quiet] == [Started, Finished]
        loud = [event async for event in engine.submit(job("loud", stream_tokens=True, stream_canvas=True))]
        assert [type(event) for event in loud] == [Started, *[Progress, Canvas] * 4, Finished]
        assert [event.step for event in loud if isinstance(event, Progress)] == [0, 1, 2, 3]


@pytest.mark.parametrize(("do", "kind"), [(Do.RAISE, "internal"), (Do.EXHAUST_MEMORY, "out_of_memory")])
async def test_an_exception_fails_its_batch_and_not_the_worker(do: Do, kind: str) -> None:
    async with running() as engine:
        pid = pid_of(engine)
        last = await failure(engine.submit(job("bad", do)))
        assert last.kind == kind
        assert "secret" not in last.message
        assert isinstance(await answer(engine.submit(job("good"))), Finished)
        assert pid_of(engine) == pid


async def test_a_refused_job_says_why() -> None:
    async with running() as engine:
        last = await answer(engine.submit(job("bad", Do.REFUSE)))
        assert last == Failed("bad", "invalid_request", "not this one", "prompt")


async def test_an_answer_too_large_for_a_frame_fails_only_its_job() -> None:
    async with running() as engine:
        await failure(engine.submit(job("large", Do.ANSWER_TOO_MUCH)))
        assert isinstance(await answer(engine.submit(job("small"))), Finished)
        assert restarts(engine) == 0


async def test_cancelled_jobs_leave_the_worker() -> None:
    async with running() as engine:
        streams = [engine.submit(job(f"job-{index}", steps=4000, step_ms=5)) for index in range(3)]
        for stream in streams:
            assert isinstance(await anext(stream), Started)
        await streams[0].aclose()
        assert in_flight(engine) == 2
        with pytest.raises(StopAsyncIteration):
            await anext(streams[0])
        # A reader whose task is cancelled drops its stream; so does one that just forgets it.
        reader = asyncio.create_task(answer(streams.pop()))
        await asyncio.sleep(0)
        reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reader
        del reader, stream
        streams.clear()
        gc.collect()
        await until(lambda: in_flight(engine) == 0)
        assert isinstance(await answer(engine.submit(job("small"))), Finished)
        await until(lambda: engine.stats.running == 0)


async def test_a_cancelled_wait_loses_no_event() -> None:
    async with running() as engine:
        stream = engine.submit(job("a", step_ms=30, stream_tokens=True))
        events: list[Event] = []
        while not events or not isinstance(events[-1], Finished):
            with contextlib.suppress(TimeoutError):
                events.append(await asyncio.wait_for(anext(stream), 0.005))
        assert [event.step for event in events if isinstance(event, Progress)] == [0, 1, 2, 3]


async def test_the_queue_is_bounded_and_says_when_to_come_back() -> None:
    async with running(configured(max_queue=3)) as engine:
        streams = [engine.submit(job(f"job-{index}", steps=5, step_ms=5)) for index in range(3)]
        with pytest.raises(QueueFull) as refused:
            engine.submit(job("one too many"))
        assert refused.value.retry_after is not None
        assert refused.value.retry_after >= 1.0
        with pytest.raises(QueueFull):
            await scores(engine, [])
        for stream in streams:
            assert isinstance(await answer(stream), Finished)
        engine.check_room(3)
        with pytest.raises(QueueFull):
            engine.check_room(4)


async def test_a_job_twice_is_a_bug_of_the_caller() -> None:
    async with running() as engine:
        stream = engine.submit(job("a"))
        with pytest.raises(ValueError, match="in flight"):
            engine.submit(job("a"))
        assert isinstance(await answer(stream), Finished)


async def test_a_job_that_no_frame_can_hold_is_refused() -> None:
    async with running() as engine:
        with pytest.raises(InvalidRequest):
            engine.submit(job("a", seed=2**64))
        assert in_flight(engine) == 0


async def test_a_running_job_past_its_deadline_is_the_business_of_the_worker() -> None:
    async with running() as engine:  # the scripted one lets it finish
        stream = engine.submit(job("a", steps=30, step_ms=10, deadline=time.time()))
        assert isinstance(await answer(stream), Finished)


async def test_scores() -> None:
    async with running() as engine:
        items = [((Message("user", "hi"),), "four"), ((), "")]
        assert await scores(engine, items) == [4.0, 0.0]
        with pytest.raises(InvalidRequest, match="no such reward model") as refused:
            await scores(engine, items, "width")
        assert refused.value.param == "model"
        assert in_flight(engine) == 0


async def test_drain_lets_running_work_finish() -> None:
    async with running() as engine:
        stream = engine.submit(job("a", steps=20, step_ms=10))
        reader = asyncio.create_task(answer(stream))
        draining = asyncio.create_task(engine.drain(20.0))
        await asyncio.sleep(0)
        assert not engine.ready
        with pytest.raises(Draining):
            engine.submit(job("late"))
        await draining
        assert isinstance(await reader, Finished)


async def test_drain_ends_what_outlasts_the_grace_time() -> None:
    async with running() as engine:
        stream = engine.submit(job("endless", steps=4000, step_ms=10))
        await engine.drain(0.05)
        assert (await failure(stream)).kind == "draining"


async def test_an_idle_engine_drains_at_once() -> None:
    async with running() as engine:
        await engine.drain(0.0)
        assert not engine.ready


def test_the_engine_runs_on_uvloop_too() -> None:
    async def life() -> tuple[Event, Event]:
        async with running() as engine:
            first = await answer(engine.submit(job("a", stream_tokens=True)))
            stream = engine.submit(job("b", steps=20, step_ms=10))
            assert isinstance(await anext(stream), Started)
            await kill_worker(engine)
            return first, await answer(stream)

    for last in uvloop.run(life()):
        assert isinstance(last, Finished)

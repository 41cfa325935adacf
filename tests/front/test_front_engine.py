"""The engine's face towards the HTTP layer, around a worker that follows a script: events, refusals, cancelling,
draining."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time

import pytest
import uvloop

from server.errors import InvalidRequest, QueueFull
from server.types import Message
from server.wire.messages import Canvas, Event, Failed, Finished, Progress, Started
from tests.front.scripted import Driven, answer, configured, failure, job, running, until
from tests.front.scripted_worker import Do


async def test_events_come_in_order_and_only_when_asked_for(engine: Driven) -> None:
    quiet = [event async for event in engine.submit(job("quiet"))]
    assert [type(event) for event in quiet] == [Started, Finished]
    loud = [event async for event in engine.submit(job("loud", stream_tokens=True, stream_canvas=True))]
    assert [type(event) for event in loud] == [Started, *[Progress, Canvas] * 4, Finished]
    assert [event.step for event in loud if isinstance(event, Progress)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("do", "failed", "restarts"),
    [
        (Do.REFUSE, Failed("bad", "invalid_request", "not this one", "prompt"), 0),
        (Do.RAISE, Failed("bad", "internal", "an internal error ended this request"), 0),
        (Do.EXHAUST_MEMORY, Failed("bad", "out_of_memory", "the device ran out of memory"), 0),
        (Do.ANSWER_TOO_MUCH, Failed("bad", "answer_too_large", "the answer is too large"), 0),
        (Do.LOSE_THE_DEVICE, Failed("bad", "internal", "an internal error ended this request"), 1),
    ],
)
async def test_an_exception_fails_its_batch_and_not_the_worker(
    engine: Driven, do: Do, failed: Failed, restarts: int
) -> None:
    """But for one that has lost its device, which needs a successor."""
    assert await engine.last(job("bad", do)) == failed
    assert isinstance(await engine.last(job("good")), Finished)
    assert engine.restarts == restarts


async def test_cancelled_jobs_leave_the_worker(engine: Driven) -> None:
    streams = await asyncio.gather(*(engine.begin(job(f"job-{index}", steps=4000, step_ms=5)) for index in range(3)))
    await streams[0].aclose()
    assert engine.in_flight == 2
    with pytest.raises(StopAsyncIteration):
        await anext(streams[0])
    # A reader whose task is cancelled drops its stream; so does one that just forgets it.
    reader = asyncio.create_task(answer(streams.pop()))
    await asyncio.sleep(0)
    reader.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await reader
    del reader
    streams.clear()
    gc.collect()
    await until(lambda: engine.in_flight == 0)
    assert isinstance(await engine.last(job("small")), Finished)
    await until(lambda: engine.stats.running == 0)


async def test_a_cancelled_wait_loses_no_event(engine: Driven) -> None:
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
            await engine.scores([])
        for stream in streams:
            assert isinstance(await answer(stream), Finished)
        engine.check_room(3)
        with pytest.raises(QueueFull):
            engine.check_room(4)


async def test_before_anything_has_finished_the_running_jobs_steps_say_when_to_come_back() -> None:
    async with running(configured(max_queue=1)) as engine:
        stream = await engine.begin(job("long", steps=4000, step_ms=10))  # forty seconds, at the least
        before = engine.stats.steps
        await until(lambda: engine.stats.steps > before)
        with pytest.raises(QueueFull) as refused:
            engine.submit(job("one too many"))
        assert refused.value.retry_after is not None
        assert 30.0 < refused.value.retry_after <= 60.0
        await stream.aclose()


async def test_what_cannot_be_handed_to_a_worker_is_not_in_flight(engine: Driven) -> None:
    stream = engine.submit(job("a"))
    with pytest.raises(ValueError, match="in flight"):
        engine.submit(job("a"))
    with pytest.raises(InvalidRequest, match="cannot be handed to the worker"):
        engine.submit(job("b", seed=2**64))
    assert engine.in_flight == 1
    assert isinstance(await answer(stream), Finished)


async def test_a_running_job_past_its_deadline_is_the_business_of_the_worker(engine: Driven) -> None:
    job_of_the_past = job("a", steps=30, step_ms=10, deadline=time.time())
    assert isinstance(await engine.last(job_of_the_past), Finished)  # the scripted one lets it


async def test_scores(engine: Driven) -> None:
    items = [((Message("user", "hi"),), "four"), ((), "")]
    assert await engine.scores(items) == [4.0, 0.0]
    with pytest.raises(InvalidRequest, match="no such reward model") as refused:
        await engine.scores(items, "width")
    assert refused.value.param == "model"
    assert engine.in_flight == 0


async def test_drain_ends_what_outlasts_the_grace_time(engine: Driven) -> None:
    stream = engine.submit(job("endless", steps=4000, step_ms=10))
    await engine.drain(0.05)
    assert (await failure(stream)).kind == "draining"


async def test_batches_take_no_place_from_others_and_are_given_up_by_a_drain() -> None:
    async with running(configured(max_queue=2)) as engine:
        lines = [engine.submit(job(f"line-{index}", steps=4000, step_ms=10, priority=1)) for index in range(2)]
        with pytest.raises(QueueFull):
            engine.check_room(priority=1)
        asked = [engine.submit(job(f"job-{index}", steps=20, step_ms=5)) for index in range(2)]
        with pytest.raises(QueueFull):
            engine.check_room()
        draining = asyncio.create_task(engine.drain(60))
        assert [(await failure(line)).kind for line in lines] == ["draining"] * 2
        for stream in asked:
            assert isinstance(await answer(stream), Finished)
        await draining


def test_the_engine_runs_on_uvloop_too() -> None:
    async def life() -> tuple[Event, Event]:
        async with running() as engine:
            first = await engine.last(job("a", stream_tokens=True))
            stream = await engine.begin(job("b", steps=20, step_ms=10))
            await engine.kill()
            return first, await answer(stream)

    for last in uvloop.run(life()):
        assert isinstance(last, Finished)

"""Streams that break, wait, or lose their reader."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator

import pytest
from starlette.types import Message

from server.settings import load
from server.types import Job, JobResult, TrajectoryResult
from server.wire.messages import Canvas, Event, Failed, Finished, Progress, Started
from tests.api.scripted_engine import (
    ScriptedEngine,
    finished,
    make,
    open_client,
    receive_once,
    scope_of,
    serving,
)
from tests.faults import hostile


async def test_failure_after_the_first_byte() -> None:
    async def breaks(job: Job) -> AsyncIterator[Event]:
        yield Started(job.id)
        yield Progress(job.id, 0, 0, [(0, 43)])
        yield Failed(job.id, "engine_failed", "lost")

    async with open_client(make(ScriptedEngine(breaks))) as client:
        response = await client.post("/v1/completions", json={"prompt": "Hi", "stream": True})
    assert response.status_code == 200
    events = response.text.strip().split("\n\n")
    assert json.loads(events[0].removeprefix("data: "))["choices"][0]["text"] == "H"
    error = json.loads(events[-2].removeprefix("data: "))["error"]
    assert error == {"message": "lost", "type": "server_error", "param": None, "code": "internal_error"}
    assert events[-1] == "data: [DONE]"


async def test_a_bug_after_the_first_byte_is_told_without_detail() -> None:
    async def breaks(job: Job) -> AsyncIterator[Event]:
        yield Started(job.id)
        yield Progress(job.id, 7, 0, [(0, 43)])  # no such choice

    async with open_client(make(ScriptedEngine(breaks))) as client:
        response = await client.post("/v1/completions", json={"prompt": "Hi", "stream": True})
    events = response.text.strip().split("\n\n")
    assert json.loads(events[-2].removeprefix("data: "))["error"]["message"] == "an internal error ended this request"
    assert events[-1] == "data: [DONE]"


async def test_no_character_of_a_text_ends_a_line() -> None:
    """httpx, as other clients in Python, splits where str.splitlines does."""
    text = "".join(map(chr, range(0x250))) + "\u2028\u2029\ufeff😀 end"

    async def says(job: Job) -> AsyncIterator[Event]:
        yield Started(job.id)
        trajectory = TrajectoryResult(0, (43,), text, "length", 1)
        yield Finished(job.id, JobResult((trajectory,), (0,), 1, 1, 0, 0.1, 1.0))

    async with (
        open_client(make(ScriptedEngine(says))) as client,
        client.stream("POST", "/v1/completions", json={"prompt": "Hi", "stream": True}) as response,
    ):
        lines = [line async for line in response.aiter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert "".join(choice["text"] for event in events for choice in event["choices"]) == text


async def test_keep_alive_comments() -> None:
    release = asyncio.Event()

    async def slow(job: Job) -> AsyncIterator[Event]:
        yield Started(job.id)
        await release.wait()
        yield finished(job)

    app = make(ScriptedEngine(slow), stream_comment_seconds=0.01)
    sent: list[bytes] = []

    async def send(message: Message) -> None:
        sent.append(message.get("body", b""))
        if sent.count(b": keep-alive\n\n") == 3:
            release.set()

    await app(scope_of(), receive_once({"prompt": "Hi", "stream": True}), send)
    assert sent.count(b": keep-alive\n\n") >= 3
    assert b"data: [DONE]\n\n" in sent


async def test_a_client_that_stops_reading_is_given_up() -> None:
    async def flood(job: Job) -> AsyncIterator[Event]:
        yield Started(job.id)
        while True:
            yield Canvas(job.id, 0, 1, [43] * 1000)
            await asyncio.sleep(0)

    engine = ScriptedEngine(flood)
    body = json.dumps({"prompt": "Hi", "stream": True, "stream_canvas": True}).encode()
    async with serving(load({"port": 0, "slow_client_seconds": 0.2}), engine) as port, asyncio.timeout(60):
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(hostile.post(body))
        while not engine.cancelled:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        writer.transport.abort()
    assert len(engine.cancelled) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels_all_its_jobs(stream: bool) -> None:
    running_jobs: list[str] = []
    both_run = asyncio.Event()

    async def run_for_ever(job: Job) -> AsyncIterator[Event]:
        yield Started(job.id)
        running_jobs.append(job.id)
        if len(running_jobs) == 2:
            both_run.set()
        await asyncio.Event().wait()

    engine = ScriptedEngine(run_for_ever)
    app = make(engine)
    left = asyncio.Event()
    body = json.dumps({"prompt": ["Hi", "Ho"], "stream": stream}).encode()
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Message:
        if (message := next(messages, None)) is not None:
            return message
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        pass

    running = asyncio.create_task(app(scope_of(), receive, send))
    await asyncio.wait_for(both_run.wait(), 30)
    left.set()
    await running
    assert len(engine.cancelled) == 2
    text = app.state.frontend.metrics.render().decode()
    assert re.search(r"entrgi:num_requests_running\S* 0\.0", text)
    assert 'entrgi:request_success_total{finished_reason="abort",model_name="dlm"} 2.0' in text

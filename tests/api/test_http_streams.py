"""Streams that break, wait, or lose their reader."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from server.api.convert import Plan
from server.api.fields import CompletionRequest
from server.api.frontend import Frontend
from server.api.generation import results
from server.errors import RequestError
from server.types import Job, JobResult, TrajectoryResult
from server.wire.messages import Canvas, Event, Failed, Finished, Progress, Started
from tests.api.scripted_engine import ScriptedEngine, finished, make, never, open_client, script, serving
from tests.faults import hostile
from tests.support.jobs import make_job

ASKED: dict[str, Any] = {"prompt": "Hi", "stream": True}


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (Failed("", "engine_failed", "lost"), "lost"),
        (Progress("", 7, 0, [(0, 43)]), "an internal error ended this request"),  # no such choice: a bug
    ],
)
async def test_a_failure_after_the_first_byte_is_told_without_detail(end: Event, message: str) -> None:
    engine = ScriptedEngine(script(Started(""), Progress("", 0, 0, [(0, 43)]), end))
    async with open_client(make(engine)) as client:
        response = await client.post("/v1/completions", json=ASKED)
    assert response.status_code == 200
    first, *_, last, done = [event.removeprefix("data: ") for event in response.text.strip().split("\n\n")]
    assert json.loads(first)["choices"][0]["text"] == "H"
    expected = {"message": message, "type": "server_error", "param": None, "code": "internal_error"}
    assert json.loads(last)["error"] == expected
    assert done == "[DONE]"


async def test_no_character_of_a_text_ends_a_line() -> None:
    """httpx, as other clients in Python, splits where str.splitlines does."""
    text = "".join(map(chr, range(0x250))) + "\u2028\u2029\ufeff😀 end"
    result = JobResult((TrajectoryResult(0, (43,), text, "length", 1),), (0,), 1, 0.1, 1.0)
    async with (
        open_client(make(ScriptedEngine(script(Started(""), Finished("", result))))) as client,
        client.stream("POST", "/v1/completions", json=ASKED) as response,
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

    lines: list[str] = []
    async with (
        serving(ScriptedEngine(slow), stream_comment_seconds=0.01) as port,
        httpx.AsyncClient(timeout=60) as client,
        client.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json=ASKED) as response,
    ):
        async for line in response.aiter_lines():
            lines.append(line)
            if lines.count(": keep-alive") == 3:
                release.set()
    assert release.is_set()
    assert lines[-2:] == ["data: [DONE]", ""]


async def test_a_client_that_stops_reading_is_given_up() -> None:
    async def flood(job: Job) -> AsyncIterator[Event]:
        yield Started(job.id)
        while True:
            yield Canvas(job.id, 0, 1, [43] * 1000)
            await asyncio.sleep(0)

    engine = ScriptedEngine(flood)
    body = json.dumps({**ASKED, "stream_canvas": True}).encode()
    async with serving(engine, slow_client_seconds=1) as port, asyncio.timeout(60):
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(hostile.post(body))
        while not engine.cancelled:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        writer.transport.abort()
    assert len(engine.cancelled) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels_all_its_jobs(stream: bool) -> None:
    engine = ScriptedEngine(never)
    body = json.dumps({"prompt": ["Hi", "Ho"], "stream": stream}).encode()
    async with serving(engine) as port, asyncio.timeout(60), httpx.AsyncClient() as client:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(hostile.post(body))
        while len(engine.jobs) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        writer.close()
        while len(engine.cancelled) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        text = (await client.get(f"http://127.0.0.1:{port}/metrics")).text
    assert 'entrgi:num_requests_running{model_name="dlm"} 0.0' in text
    assert 'entrgi:request_success_total{finished_reason="abort",model_name="dlm"} 2.0' in text


@pytest.mark.parametrize("turns", range(8))
async def test_a_client_that_leaves_while_its_request_fails_leaves_nothing_behind(turns: int) -> None:
    """The cancellation comes so many turns of the loop after the start, that is before, in and after the clean-up."""

    async def first_fails(job: Job) -> AsyncIterator[Event]:
        if job.prompt_index == 0:
            yield Failed(job.id, "deadline", "too late", "timeout")
        async for event in never(job):
            yield event

    engine = ScriptedEngine(first_fails)
    frontend: Frontend = make(engine).state.frontend
    asked = CompletionRequest.model_validate({"prompt": ["one", "two"]})
    jobs = (make_job("one", prompt_index=0), make_job("two", prompt_index=1))
    working = asyncio.create_task(results(frontend, Plan("cmpl-1", 0, "dlm", asked, jobs)))
    for _ in range(turns):
        await asyncio.sleep(0)
    working.cancel()
    with pytest.raises((asyncio.CancelledError, RequestError)):
        await working
    for gauge in (frontend.metrics.requests_waiting, frontend.metrics.requests_running):
        assert all(sample.value == 0 for family in gauge.collect() for sample in family.samples)
    assert engine.closed == ({"one", "two"} if turns else set())

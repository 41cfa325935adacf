"""One request, followed by its id: what the access line tells, what is counted, what one API key may have in flight."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import subprocess
from collections.abc import AsyncIterator
from typing import Any

import pytest

from server.api import build
from server.types import Job
from server.wire.messages import Event, Failed, Started
from tests.api.scripted_engine import (
    INFO,
    KEYS,
    ScriptedEngine,
    at_once,
    bearer,
    check_envelope,
    make,
    never,
    open_client,
)
from tests.support.serving import ROOT

GUIDED = {"prompt": ["a", "b"], "guidance": {"method": "entrgi", "gradient_steps": 2}, "best_of": 3}


async def too_late(job: Job) -> AsyncIterator[Event]:
    """A failure after a second, when a stream has begun."""
    yield Started(job.id)
    await asyncio.sleep(1.2)
    yield Failed(job.id, "out_of_memory", "no memory")


def told(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """The access lines, as their fields."""
    return [vars(record) for record in caplog.records if record.name == "server.access"]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_access_line_tells_what_was_asked_and_what_it_took(
    stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "server.access")
    async with open_client(make(api_key=KEYS)) as client:
        headers = {**bearer(KEYS[0]), "X-Request-Id": "mine-1"}
        answers = [
            await client.post("/v1/completions", json={**GUIDED, "stream": stream}, headers=headers) for _ in range(2)
        ]
    first, second = told(caplog)
    asked = {"model": "dlm", "guidance": "entrgi", "gradient_steps": 2, "best_of": 3, "prompts": 2}
    assert asked.items() <= first.items()
    assert {"tokens": 4, "finish_reason": "length", "status": 200}.items() <= first.items()
    assert first["queue_ms"] >= 0
    assert 0 <= first["generation_ms"] <= 1000 * first["seconds"] + 1
    assert first["key"] == hashlib.sha256(KEYS[0].encode()).hexdigest()[:8]
    assert KEYS[0] not in str(first)
    # The answer's id holds the request's, and is its own although the client gave the same to two requests.
    assert first["completion_id"].startswith("cmpl-mine-1-")
    assert first["completion_id"] != second["completion_id"]
    for answer, line in zip(answers, (first, second), strict=True):
        assert f'"id": "{line["completion_id"]}"' in answer.text.replace('":"', '": "')


async def test_a_stream_that_fails_is_a_failure_in_log_and_metrics(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "server.access")
    async with open_client(make(ScriptedEngine(too_late))) as client:
        response = await client.post("/v1/completions", json={"prompt": "Hi", "stream": True})
        assert (response.status_code, "no memory" in response.text) == (200, True)
        await client.get("/v1/models/dlm")
        await client.get("/nowhere/at/all")
        metrics = (await client.get("/metrics")).text
    line = told(caplog)[0]
    assert {"status": 200, "error_code": "out_of_memory", "error_status": 500}.items() <= line.items()
    assert line["generation_ms"] >= 1000
    for route, status in (("/v1/completions", 500), ("/v1/models/{model_id:path}", 200), ("other", 404)):
        assert f'entrgi:http_requests_total{{route="{route}",status="{status}"}} 1.0' in metrics


@pytest.mark.parametrize(
    ("setting", "named"), [({"max_key_requests": 1}, "requests"), ({"max_key_trajectories": 4}, "trajectories")]
)
async def test_a_key_has_no_more_in_flight_than_it_may(setting: dict[str, int], named: str) -> None:
    engine = ScriptedEngine(never)
    async with open_client(make(engine, api_key=KEYS, **setting)) as client:

        def asked(key: str, n: int = 3) -> Any:
            return client.post("/v1/completions", json={"prompt": "Hi", "n": n}, headers=bearer(key))

        running = [asyncio.create_task(asked(key)) for key in KEYS]  # each has its own share
        while len(engine.jobs) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        refused = await asked(KEYS[0])
        error = check_envelope(refused, 429)
        assert error["code"] == "key_limit"
        assert f"max_key_{named}" in error["message"]
        assert int(refused.headers["retry-after"]) >= 1
        running[0].cancel()
        await asyncio.gather(running[0], return_exceptions=True)
        engine._script = at_once
        assert (await asked(KEYS[0])).status_code == 200
        assert (await asked(KEYS[1])).status_code == 429
        if named == "trajectories":
            assert check_envelope(await asked(KEYS[0], 5), 400)["param"] == "best_of"
        running[1].cancel()
        await asyncio.gather(running[1], return_exceptions=True)


async def test_how_the_work_is_done_and_why_not_better_is_exported() -> None:
    engine = ScriptedEngine(at_once)
    engine.replicas[0].info, engine.replicas[0].ready = INFO, True
    async with open_client(make(engine)) as client:
        metrics = (await client.get("/metrics")).text
    assert 'entrgi:execution_info{how="cpu",model="",part="device",why=""} 1.0' in metrics
    assert 'entrgi:execution_info{how="sdpa",model="rm",part="attention",why="it needs a CUDA device"} 1.0' in metrics


async def test_the_commit_is_named() -> None:
    async with open_client(make()) as client:
        named = (await client.get("/version")).json()["commit"]
        assert f'entrgi:build_info{{commit="{named}"' in (await client.get("/metrics")).text
    assert named == build.commit()


def test_the_commit_is_what_git_or_the_image_says(monkeypatch: pytest.MonkeyPatch) -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert build.commit.__wrapped__().removesuffix("-dirty") == head.stdout.strip()
    monkeypatch.setenv("SOURCE_COMMIT", "0a1b2c")
    assert build.commit.__wrapped__() == "0a1b2c"

"""The error envelope on every path, and the states that a healthy server is never in."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from server.errors import Draining, NotReady, QueueFull
from server.types import Job
from server.wire.config import EngineConfig, WorkerConfig
from server.wire.messages import Event, Failed
from tests.api.scripted_engine import ScriptedEngine, at_once, check_envelope, make, open_client, operations, unloaded


async def test_envelope_on_every_path() -> None:
    app = make()
    async with open_client(app) as client:
        check_envelope(await client.get("/v1/nowhere"), 404)
        check_envelope(await client.get("/v1/completions/"), 404)
        check_envelope(await client.get("/%0d%0aX: y"), 404)
        for method, path in operations(app):
            response = await client.request("DELETE", path)
            check_envelope(response, 405)
            assert response.headers["allow"] == {"GET": "GET, HEAD", "POST": "POST"}[method]
        for path in [path for method, path in operations(app) if method == "POST"]:
            check_envelope(await client.post(path, content=b"{}"), 415)
            check_envelope(await client.post(path, content=b"{}", headers={"Content-Type": "text/plain"}), 415)
            check_envelope(await client.post(path, content=b"{", headers={"Content-Type": "application/json"}), 400)
            check_envelope(await client.post(path, json=[]), 400)
            assert (await client.head(path)).status_code == 405
        assert all("head" not in methods for methods in app.openapi()["paths"].values())
        response = await client.post(
            "/v1/completions", content=b"{}", headers={"Content-Type": "application/JSON; x=y"}
        )
        check_envelope(response, 400)


async def test_unexpected_failure_says_nothing_about_itself(caplog: pytest.LogCaptureFixture) -> None:
    async with open_client(make()) as client:
        response = await client.post("/v1/score", json={"queries": "a", "documents": "b"})
    error = check_envelope(response, 500)
    assert "secret" not in response.text
    assert error["type"] == "server_error"
    assert any(record.exc_info for record in caplog.records)


async def test_failures_of_the_worker() -> None:
    for kind, status, code in (
        ("invalid_request", 400, "invalid_value"),
        ("not_finite", 400, "not_finite"),
        ("deadline", 408, "deadline_exceeded"),
        ("unavailable", 503, "unavailable"),
        ("worker_lost", 503, "worker_lost"),
        ("out_of_memory", 500, "out_of_memory"),
        ("answer_too_large", 500, "answer_too_large"),
        ("engine_failed", 500, "internal_error"),
    ):

        async def fail(job: Job, kind: str = kind) -> AsyncIterator[Event]:
            yield Failed(job.id, kind, "no")

        async with open_client(make(ScriptedEngine(fail))) as client:
            for stream in (False, True):
                response = await client.post("/v1/completions", json={"prompt": "Hi", "stream": stream})
                assert check_envelope(response, status)["code"] == code
                hopeless = kind in ("deadline", "worker_lost", "answer_too_large")
                assert (response.headers.get("x-should-retry") == "false") == hopeless
                assert ("retry-after" in response.headers) == (kind == "unavailable")


async def test_before_the_models_are_loaded() -> None:
    async with open_client(make(unloaded())) as client:
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/ping")).status_code == 200
        assert (await client.get("/version")).json()["version"]
        assert (await client.get("/metrics")).status_code == 200
        for response in (
            await client.get("/ready"),
            await client.get("/v1/models"),
            await client.post("/v1/completions", json={"prompt": "Hi"}),
            await client.post("/tokenize", json={"prompt": "Hi"}),
            await client.post("/v1/score", json={"queries": "a", "documents": "b"}),
        ):
            assert check_envelope(response, 503)["code"] == "not_ready"
            assert int(response.headers["retry-after"]) >= 1


async def test_a_start_that_fails_is_unhealthy() -> None:
    app = make(unloaded())
    app.state.frontend.failure = RuntimeError("no such checkpoint")
    async with open_client(app) as client:
        check_envelope(await client.get("/health"), 503)
        assert (await client.head("/health")).status_code == 503


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (QueueFull("no room", retry_after=6.2), 429, "queue_full"),
        (Draining("shutting down", retry_after=5.0), 503, "draining"),
        (NotReady("no worker"), 503, "not_ready"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_refusals(error: Exception, status: int, code: str, stream: bool) -> None:
    engine = ScriptedEngine(at_once, refuse=error, is_ready=False)
    async with open_client(make(engine)) as client:
        response = await client.post("/v1/completions", json={"prompt": "Hi", "stream": stream})
        assert check_envelope(response, status)["code"] == code
        assert response.headers["retry-after"] == {"queue_full": "7", "draining": "5", "not_ready": "1"}[code]
        metrics = (await client.get("/metrics")).text
        assert f'entrgi:admission_rejections_total{{reason="{code}"}} 1.0' in metrics
        if status == 503:
            assert check_envelope(await client.get("/ready"), 503)["code"] == code
            assert (await client.get("/health")).status_code == 200


async def test_more_prompts_than_places_are_no_reason_to_wait() -> None:
    engine = ScriptedEngine(at_once)
    engine.config = EngineConfig(WorkerConfig("dlm"), max_queue=2)
    async with open_client(make(engine)) as client:
        error = check_envelope(await client.post("/v1/completions", json={"prompt": ["a", "b", "c"]}), 400)
        assert error["param"] == "prompt"
        assert (await client.post("/v1/completions", json={"prompt": ["a", "b"]})).status_code == 200


async def test_body_limit() -> None:
    async with open_client(make(max_body_bytes=2000)) as client:
        big = {"prompt": "x" * 3000}
        error = check_envelope(await client.post("/v1/completions", json=big), 413)
        assert "2000" in error["message"]

        async def chunks() -> AsyncIterator[bytes]:
            yield b'{"prompt": "'
            for _ in range(100):
                yield b"x" * 100

        chunked = {"Content-Type": "application/json"}
        check_envelope(await client.post("/v1/completions", content=chunks(), headers=chunked), 413)
        lying = {"Content-Type": "application/json", "Content-Length": "abc"}
        check_envelope(await client.post("/v1/completions", content=b"{}", headers=lying), 400)
        assert (await client.post("/v1/completions", json={"prompt": "x" * 50})).status_code == 200

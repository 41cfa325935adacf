"""The HTTP layer by itself, in-process: keys, limits, request ids, the envelope on every path, and the states that a
healthy server is never in. A scripted engine stands for the worker; no text here comes from a model."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.routing import Route
from starlette.types import Message, Scope

from server.api.app import create_app
from server.engine.config import EngineConfig, WorkerConfig
from server.engine.engine import Engine, EngineStats
from server.engine.messages import Event, Failed, Finished, Progress, Started
from server.engine.stats import RunnerStats
from server.errors import Draining, NotReady, QueueFull
from server.settings import load
from server.types import EngineInfo, Job, JobResult, ModelInfo, RewardModelInfo, TrajectoryResult

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "dream-tiny"
KEYS = ["first-key-1234", "second-key-5678"]
INFO = EngineInfo(
    model=ModelInfo("dlm", "dream", str(GOLDEN / "dlm"), 128, 512, 3, 0, 0, (0, 2), 8, "float32"),
    reward_models=(RewardModelInfo("rm", "qwen3", 128, 1.0, "unk", "float32"),),
    device="cpu",
    kernel_backend="torch",
)

Script = Callable[[Job], AsyncIterator[Event]]


class ScriptedEngine(Engine):
    """The engine's face without a worker: every job gets the events of `script`."""

    def __init__(self, script: Script, refuse: Exception | None = None, *, is_ready: bool = True) -> None:
        super().__init__(EngineConfig(WorkerConfig("dlm")))
        self._script = script
        self.refuse = refuse
        self.is_ready = is_ready
        self.cancelled: list[str] = []

    async def start(self) -> None:
        """Nothing to load."""

    async def stop(self) -> None:
        """Nothing to stop."""

    @property
    def ready(self) -> bool:
        return self.is_ready

    @property
    def info(self) -> EngineInfo:
        return INFO

    @property
    def stats(self) -> EngineStats:
        return EngineStats(RunnerStats(), 0, 0, self.is_ready)

    def check_room(self, jobs: int = 1) -> None:
        if self.refuse is not None:
            raise self.refuse

    def submit(self, job: Job) -> Any:
        return Scripted(self, job)

    async def score(self, reward_model: str, items: Any, *, deadline: float | None = None) -> list[float]:
        raise RuntimeError("scoring broke in /secret/place")


class Scripted:
    """A job's events; notes when it is closed early."""

    def __init__(self, engine: ScriptedEngine, job: Job) -> None:
        self._engine, self._job = engine, job
        self._events = engine._script(job)
        self._ended = False

    def __aiter__(self) -> Scripted:
        return self

    async def __anext__(self) -> Event:
        if self._ended:
            raise StopAsyncIteration
        event = await anext(self._events)
        self._ended = isinstance(event, Finished | Failed)
        return event

    async def aclose(self) -> None:
        if not self._ended:
            self._engine.cancelled.append(self._job.id)
        self._ended = True


def finished(job: Job) -> Finished:
    trajectory = TrajectoryResult(0, (43, 76), "Hi", "length", 2)
    return Finished(job.id, JobResult((trajectory,), (0,), 2, 2, 0, 0.1, 1.0))


async def at_once(job: Job) -> AsyncIterator[Event]:
    yield Started(job.id)
    yield Progress(job.id, 0, 0, [(0, 43)])
    yield finished(job)


async def never(job: Job) -> AsyncIterator[Event]:
    yield Started(job.id)
    await asyncio.Event().wait()


def make(engine: Engine | None = None, **settings: Any) -> FastAPI:
    return create_app(engine or ScriptedEngine(at_once), load(settings))


def unloaded() -> Engine:
    """A real engine that has not been started."""
    return Engine(EngineConfig(WorkerConfig("dlm")))


@asynccontextmanager
async def open_client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        yield client


def routes(of: Any) -> Iterator[tuple[str, str]]:
    """Every (method, path) that is routed, found and not listed; an application or a router."""
    for route in of.routes:
        if isinstance(route, Route):
            yield from ((method, route.path) for method in (route.methods or {"GET"}) - {"HEAD"})
        else:
            yield from routes(route.original_router)  # whatever is neither a route nor a router breaks this test


def operations(app: FastAPI) -> Iterator[tuple[str, str]]:
    """Every (method, path) in the OpenAPI document."""
    document = app.openapi()
    for path, methods in document["paths"].items():
        for method in methods:
            yield method.upper(), path.replace("{model_id}", "dlm")


def check_envelope(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert isinstance(error["type"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    return error


# -- keys ----------------------------------------------------------------------------------------------------


async def test_every_route_is_guarded() -> None:
    app = make(api_key=KEYS)
    found = {(method, path.replace("{model_id:path}", "dlm")) for method, path in routes(app)}
    assert found == set(operations(app)) | {("GET", "/openapi.json")}
    open_paths = {"/health", "/ready", "/ping"}
    async with open_client(app) as client:
        for method, path in found:
            for headers in ({}, {"Authorization": "Bearer wrong-key-0000"}, {"Authorization": f"Basic {KEYS[0]}"}):
                response = await client.request(method, path, headers=headers)
                if path in open_paths:
                    assert response.status_code == 200
                else:
                    error = check_envelope(response, 401)
                    assert error["code"] == "invalid_api_key"
                    assert response.headers["www-authenticate"].startswith("Bearer")
            for key in KEYS:
                response = await client.request(method, path, headers={"Authorization": f"bearer {key}"})
                assert response.status_code not in (401, 403)
        for path in ("/nowhere", "/health/", "//health", "/HEALTH", "/v1/%2e%2e/health"):
            assert (await client.get(path)).status_code == 401


async def test_wrong_keys() -> None:
    async with open_client(make(api_key=KEYS)) as client:
        for value in ("", "Bearer", "Bearer ", KEYS[0], f"Bearer {KEYS[0]}x", f"Bearer {KEYS[0].upper()}"):
            assert (await client.get("/version", headers={"Authorization": value})).status_code == 401
        twice = [("Authorization", f"Bearer {KEYS[0]}"), ("Authorization", f"Bearer {KEYS[0]}")]
        assert (await client.get("/version", headers=twice)).status_code == 401
        assert (await client.get("/version", headers={"Authorization": f"Bearer {KEYS[1]}"})).status_code == 200


async def test_open_by_flag() -> None:
    async with open_client(make(api_key=KEYS, public_metrics=True, public_playground=True)) as client:
        assert (await client.get("/metrics")).status_code == 200
        assert (await client.get("/")).status_code == 200
        assert (await client.get("/v1/models")).status_code == 401


async def test_root_path_opens_nothing_else() -> None:
    async with open_client(make(api_key=KEYS, root_path="/llm")) as client:
        assert (await client.get("/llm/health")).status_code == 200
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/llm/v1/models")).status_code == 401
        key = {"Authorization": f"Bearer {KEYS[0]}"}
        assert (await client.get("/llm/v1/models", headers=key)).status_code == 200
        assert (await client.get("/v1/models", headers=key)).status_code == 200


# -- the envelope --------------------------------------------------------------------------------------------


async def test_envelope_on_every_path() -> None:
    app = make()
    async with open_client(app) as client:
        check_envelope(await client.get("/v1/nowhere"), 404)
        check_envelope(await client.get("/v1/completions/"), 404)
        check_envelope(await client.get("/%0d%0aX: y"), 404)
        paths = {path for _, path in operations(app)}
        for path in paths:
            response = await client.request("DELETE", path)
            check_envelope(response, 405)
            assert response.headers["allow"] in ("GET", "POST")
        for path in [path for method, path in operations(app) if method == "POST"]:
            check_envelope(await client.post(path, content=b"{}"), 415)
            check_envelope(await client.post(path, content=b"{}", headers={"Content-Type": "text/plain"}), 415)
            check_envelope(await client.post(path, content=b"{", headers={"Content-Type": "application/json"}), 400)
            check_envelope(await client.post(path, json=[]), 400)
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
        ("out_of_memory", 500, "internal_error"),
        ("engine_failed", 500, "internal_error"),
    ):

        async def fail(job: Job, kind: str = kind) -> AsyncIterator[Event]:
            yield Failed(job.id, kind, "no")

        async with open_client(make(ScriptedEngine(fail))) as client:
            for stream in (False, True):
                response = await client.post("/v1/completions", json={"prompt": "Hi", "stream": stream})
                assert check_envelope(response, status)["code"] == code
                assert (response.headers.get("x-should-retry") == "false") == (status == 408)
                assert ("retry-after" in response.headers) == (status == 503)


# -- states --------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (QueueFull(retry_after=6.2), 429, "queue_full"),
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


# -- streams -------------------------------------------------------------------------------------------------


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


async def test_keep_alive_comments() -> None:
    release = asyncio.Event()

    async def slow(job: Job) -> AsyncIterator[Event]:
        yield Started(job.id)
        await release.wait()
        yield finished(job)

    app = make(ScriptedEngine(slow), keep_alive_seconds=0.01)
    sent: list[bytes] = []

    async def send(message: Message) -> None:
        sent.append(message.get("body", b""))
        if sent.count(b": keep-alive\n\n") == 3:
            release.set()

    await app(scope_of(), receive_once({"prompt": "Hi", "stream": True}), send)
    assert sent.count(b": keep-alive\n\n") >= 3
    assert b"data: [DONE]\n\n" in sent


async def test_a_client_that_stops_reading_is_given_up() -> None:
    engine = ScriptedEngine(never)
    app = make(engine, keep_alive_seconds=0.01, stalled_client_seconds=0.1)

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    await app(scope_of(), receive_once({"prompt": "Hi", "stream": True}), send)
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


def scope_of(path: str = "/v1/completions") -> Scope:
    return {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "headers": [(b"content-type", b"application/json"), (b"host", b"server")], "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80), "state": {},
    }  # fmt: skip


def receive_once(body: dict[str, Any]) -> Callable[[], Any]:
    """A client that sends its body and stays."""
    messages = iter([{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}])

    async def receive() -> Message:
        if (message := next(messages, None)) is None:
            await asyncio.Event().wait()
            raise AssertionError
        return message

    return receive


# -- limits, ids, origins ------------------------------------------------------------------------------------


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


async def test_header_limit() -> None:
    async with open_client(make()) as client:
        check_envelope(await client.get("/version", headers={"X-Big": "x" * 70_000}), 431)
        assert (await client.get("/version", headers={"X-Big": "x" * 60_000})).status_code == 200


async def test_request_ids(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "server.access")
    async with open_client(make(api_key=KEYS)) as client:
        for path in ("/version", "/nowhere", "/health"):
            assert (await client.get(path, headers={"X-Request-Id": "a.B-9_z"})).headers["x-request-id"] == "a.B-9_z"
        for bad in ("", "a b", "x" * 129, "a\tb", "é", "a;b"):
            given = (await client.get("/version", headers={"X-Request-Id": bad.encode()})).headers["x-request-id"]
            assert re.fullmatch(r"[0-9a-f]{32}", given)
    assert {record.status for record in caplog.records if record.name == "server.access"} == {401}


async def test_prompts_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with open_client(make()) as client:
        secret = "the-secret-of-the-prompt"
        assert (await client.post("/v1/completions", json={"prompt": secret})).status_code == 200
        assert (await client.post("/v1/completions", json={"prompt": secret, "n": secret})).status_code == 400
        body = {"messages": [{"role": "user", "content": secret}], "guidance": "bon", "stream": True}
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    assert caplog.records
    assert not any(secret in str(vars(record)) for record in caplog.records)


async def test_cors() -> None:
    origin = {"Origin": "https://app.example"}
    preflight = {**origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    async with open_client(make(api_key=KEYS, cors_origins=["https://app.example"])) as client:
        response = await client.options("/v1/completions", headers=preflight)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "https://app.example"
        refused = await client.get("/v1/models", headers=origin)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://app.example"
        other = await client.get("/health", headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
    async with open_client(make()) as client:
        assert "access-control-allow-origin" not in (await client.get("/health", headers=origin)).headers


# -- the document --------------------------------------------------------------------------------------------


async def test_openapi_is_complete() -> None:
    app = make()
    document = app.openapi()
    text = json.dumps(document)
    for reference in re.findall(r'"\$ref": "#/components/schemas/([^"]+)"', text):
        assert reference in document["components"]["schemas"]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert "422" not in operation["responses"], path
            assert ("requestBody" in operation) == (method == "post")
            for status, response in operation["responses"].items():
                if status != "200":
                    schema = response["content"]["application/json"]["schema"]
                    assert schema == {"$ref": "#/components/schemas/ErrorEnvelope"}
    assert "text/event-stream" in document["paths"]["/v1/completions"]["post"]["responses"]["200"]["content"]
    async with open_client(app) as client:
        assert (await client.get("/openapi.json")).json() == document
        for path in ("/docs", "/redoc"):  # both would load scripts from elsewhere
            assert (await client.get(path)).status_code == 404

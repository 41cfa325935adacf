"""The HTTP layer in-process: a scripted engine stands for the worker; no text here comes from a model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from opentelemetry.trace import TracerProvider
from starlette.routing import Route

from server.api.app import create_app
from server.cli import Server, http_config
from server.front.engine import Engine
from server.settings import load
from server.types import EngineInfo, Job, JobResult, ModelInfo, RewardModelInfo, TrajectoryResult, Way
from server.wire.config import EngineConfig, WorkerConfig
from server.wire.messages import Event, Failed, Finished, Progress, Scored, Started

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "dream-tiny"
KEYS = ["first-key-1234", "second-key-5678"]
INFO = EngineInfo(
    model=ModelInfo("dlm", "dream", str(GOLDEN / "dlm"), 128, 512, 3, 0, 0, (0, 2), 8, "float32", 1000),
    reward_models=(RewardModelInfo("rm", "qwen3", 128, 1.0, "unk", "float32", 500),),
    device="cpu",
    kernel_backend="torch",
    ways=(Way("device", "", "cpu"), Way("attention", "rm", "sdpa", "it needs a CUDA device")),
)

Script = Callable[[Job], AsyncIterator[Event]]


class ScriptedEngine(Engine):
    """The engine's face without a worker: every job gets the events of `script`."""

    info = INFO  # type: ignore[assignment]

    def __init__(
        self, script: Script, refuse: Exception | None = None, *, is_ready: bool = True, info: EngineInfo = INFO
    ) -> None:
        super().__init__(EngineConfig(WorkerConfig("dlm")))
        self._script = script
        self.refuse = refuse
        self.is_ready = is_ready
        self.info = info
        self.jobs: list[Job] = []
        self.cancelled: list[str] = []
        self.closed: set[str] = set()

    async def start(self) -> None:
        """Nothing to load."""

    async def stop(self) -> None:
        """Nothing to stop."""

    @property
    def ready(self) -> bool:
        return self.is_ready

    def check_room(self, jobs: int = 1, priority: int = 0) -> None:
        if self.refuse is not None:
            raise self.refuse

    def submit(self, job: Job, metadata: Any = None) -> Any:
        self.jobs.append(job)
        self.metadata = metadata
        return Scripted(self, job)

    async def score(
        self, reward_model: str, items: Any, *, deadline: float | None = None, metadata: Any = None
    ) -> Scored:
        raise RuntimeError("scoring broke in /secret/place")


class Scripted:
    """A job's events; notes when it is closed, and when early."""

    begun_at: float | None = None

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
        self._engine.closed.add(self._job.id)
        if not self._ended:
            self._engine.cancelled.append(self._job.id)
        self._ended = True


def finished(job: Job) -> Finished:
    rewards = dict.fromkeys((reward.model for reward in job.guidance.rewards), 0.5)
    trajectory = TrajectoryResult(0, (43, 76), "Hi", "length", 2, rewards=rewards, model_calls=2)
    return Finished(job.id, JobResult((trajectory,), (0,), 2, 0.1, 1.0))


def script(*events: Event) -> Script:
    """These events for every job; nobody here reads whose they say they are."""

    async def run(job: Job) -> AsyncIterator[Event]:
        for event in events:
            yield event

    return run


async def at_once(job: Job) -> AsyncIterator[Event]:
    yield Started(job.id)
    yield Progress(job.id, 0, 0, [(0, 43)])
    yield finished(job)


async def never(job: Job) -> AsyncIterator[Event]:
    yield Started(job.id)
    await asyncio.Event().wait()


def make(engine: Engine | None = None, *, tracer_provider: TracerProvider | None = None, **settings: Any) -> FastAPI:
    return create_app(engine or ScriptedEngine(at_once), load(settings), tracer_provider=tracer_provider)


def unloaded() -> Engine:
    """A real engine that has not been started."""
    return Engine(EngineConfig(WorkerConfig("dlm")))


@asynccontextmanager
async def open_client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        yield client


@asynccontextmanager
async def serving(engine: Engine | None = None, **settings: Any) -> AsyncIterator[int]:
    """The application on a real socket, as the command line serves it; the port."""
    loaded = load({"port": 0, **settings})
    server = Server(http_config(create_app(engine or ScriptedEngine(at_once), loaded), loaded))
    sock = server.config.bind_socket()
    running = asyncio.create_task(server.serve(sockets=[sock]))
    try:
        while not server.started:
            assert not running.done(), running.result()
            await asyncio.sleep(0.01)
        yield sock.getsockname()[1]
    finally:
        server.should_exit = True
        await running
        sock.close()


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


def bearer(key: str) -> dict[str, str]:
    """The header that gives a key."""
    return {"Authorization": f"Bearer {key}"}


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

"""An engine around the scripted worker, and what its tests do again and again."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from server.front.engine import Engine, JobStream
from server.types import DiffusionParams, Job, Message, SamplingParams
from server.wire.config import EngineConfig, WorkerConfig
from server.wire.messages import Event, Failed, Finished, Started
from tests.front.scripted_worker import Do, token

CONFIG = EngineConfig(
    WorkerConfig("scripted", heartbeat_seconds=0.1, log_level="CRITICAL"),
    watchdog_seconds=30.0,
    backoff_seconds=0.05,
    stop_grace_seconds=2.0,
    spare_worker=False,
    worker_command=(sys.executable, "-P", str(Path(__file__).with_name("scripted_worker.py"))),
)


def configured(model: str = "scripted", data_parallel: int = 1, **changes: object) -> EngineConfig:
    worker = replace(CONFIG.worker, model=model, data_parallel=data_parallel)
    return replace(CONFIG, worker=worker, **changes)  # type: ignore[arg-type]


class Driven(Engine):
    """An engine, and what its tests ask of it and do to it."""

    @property
    def in_flight(self) -> int:
        return len(self._pending)

    @property
    def restarts(self) -> int:
        return sum(replica.restarts for replica in self.replicas)

    @property
    def suspects(self) -> int:
        return self._dispatcher.suspects

    @property
    def pids(self) -> list[int]:
        """The processes of the workers that are there."""
        return [replica.worker.process.pid for replica in self.replicas if replica.worker is not None]

    async def begin(self, job: Job) -> JobStream:
        """A job that a worker has begun to compute."""
        stream = self.submit(job)
        assert isinstance(await anext(stream), Started)
        return stream

    async def last(self, job: Job) -> Event:
        """What ends a job."""
        return await answer(self.submit(job))

    async def scores(self, items: list[tuple[tuple[Message, ...], str]], model: str = "length") -> list[float]:
        return (await self.score(model, items)).scores

    async def kill(self, rank: int = 0) -> None:
        """Kill a worker, ready or still loading, as soon as it is there, and wait until the engine has noticed."""
        replica = self.replicas[rank]
        await until(lambda: replica.worker is not None)
        victim = replica.worker
        assert victim is not None
        os.kill(victim.process.pid, signal.SIGKILL)
        await until(lambda: replica.worker is not victim)


@asynccontextmanager
async def running(config: EngineConfig = CONFIG) -> AsyncIterator[Driven]:
    engine = Driven(config)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def job(name: str, do: Do = Do.FINISH, *, steps: int = 4, step_ms: int = 1, seed: int = 7, **fields: object) -> Job:
    return Job(name, (do, step_ms), SamplingParams(steps, seed=seed), DiffusionParams(steps), **fields)  # type: ignore[arg-type]


async def answer(stream: JobStream) -> Event:
    """The last event; checks that there is exactly one answer."""
    events = [event async for event in stream]
    assert [isinstance(event, Finished | Failed) for event in events] == [False] * (len(events) - 1) + [True]
    return events[-1]


async def failure(stream: JobStream) -> Failed:
    last = await answer(stream)
    assert isinstance(last, Failed), last
    return last


async def tokens(stream: JobStream) -> tuple[int, ...]:
    """Those of a job that must finish."""
    last = await answer(stream)
    assert isinstance(last, Finished), last
    return last.result.trajectories[0].token_ids


def tokens_of(seed: int, count: int) -> tuple[int, ...]:
    return tuple(token(seed, position) for position in range(count))


async def until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Wait for something that the engine does by itself."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  (what is waited for has no event of its own)
            await asyncio.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether the process or a thread of it runs; an orphaned zombie does not, and its status is its new parent's
    business."""
    try:
        threads = len(os.listdir(f"/proc/{pid}/task"))
        return threads > 1 or Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False

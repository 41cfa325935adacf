"""One of the engine's workers and its successors: started, watched, killed when it hangs, replaced when it dies.

What a worker says about requests goes to the engine; so does the news of its coming and going. A replica knows nothing
of requests; its number and its sums outlive every process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from server.errors import ConfigurationError, EngineFailed, EntrgiError
from server.front.process import Spare, WorkerProcess
from server.types import EngineInfo
from server.wire.config import EngineConfig
from server.wire.messages import (
    AdaptersSet,
    ChannelClosed,
    Configure,
    Event,
    Heartbeat,
    Ready,
    SetAdapters,
    Shutdown,
    WorkerError,
    frame,
)
from server.wire.stats import RunnerStats

if TYPE_CHECKING:
    from server.front.engine import Engine

logger = logging.getLogger(__name__)

WATCH_SECONDS = 0.25
MAX_FAILED_STARTS = 2  # in a row; after that nobody waits for this worker until one succeeds
Told = TypeVar("Told", bound=Event)


class Replica:
    """Worker number `rank`: one process at a time, from `start` to `stop`.

    `info` is what the last ready process loaded, `restarts` how often one was started after the first, `failed_starts`
    how many in a row did not get ready.
    """

    def __init__(self, rank: int, config: EngineConfig, engine: Engine, spare: Spare | None) -> None:
        self.rank = rank
        self.name = f"worker {rank}"
        self.info: EngineInfo | None = None
        self.ready = False
        self.restarts = 0
        self.failed_starts = 0
        self.worker: WorkerProcess | None = None
        self._config = config
        self._engine = engine
        self._spare = spare
        self._past = RunnerStats()  # of processes that are no more
        self._present = RunnerStats()
        self._task: asyncio.Task[None] | None = None

    @property
    def stats(self) -> RunnerStats:
        """Sums over all processes so far, at most a heartbeat old; gauges of the present one."""
        return self._past.plus(self._present)

    @property
    def steps(self) -> int:
        """Denoising steps that all processes did so far, without the cost of `stats`."""
        return self._past.steps + self._present.steps

    @property
    def given_up(self) -> bool:
        """Whether nobody waits for it any longer."""
        return not self.ready and self.failed_starts >= MAX_FAILED_STARTS

    @property
    def backoff_seconds(self) -> float:
        """How long the next start waits: not at all, unless workers keep dying before they are ready."""
        if self.failed_starts == 0:
            return 0.0
        doubled = self._config.backoff_seconds * 2.0 ** min(self.failed_starts - 1, 30)
        return min(doubled, self._config.max_backoff_seconds)

    async def start(self) -> None:
        """Start the first process and wait until it is ready. Raises ConfigurationError when a setting or a checkpoint
        is wrong, EngineFailed when the process dies for another reason; nothing is left running then."""
        await self._launch()
        self._task = asyncio.create_task(self._supervise(), name=f"supervise {self.name}")

    async def stop(self) -> None:
        """End the process: by its own hand within the grace time, else by ours."""
        self.ready = False
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        worker, self.worker = self.worker, None
        if worker is not None:
            worker.send(frame(Shutdown()))
            last_words = asyncio.create_task(_ignore(worker))  # it may have to say them before it can listen
            await worker.reap(self._config.stop_grace_seconds)
            await last_words

    def send(self, data: bytes) -> None:
        """Send a frame to a ready worker; without one, nothing: the next one is sent everything again."""
        if self.ready and self.worker is not None:
            self.worker.send(data)

    async def _supervise(self) -> None:
        while True:
            try:
                worker = self.worker
                if worker is None:
                    await asyncio.sleep(self.backoff_seconds)
                    self.restarts += 1
                    worker = await self._launch()
                await self._attend(worker)
            except Exception as error:
                # What is none of our errors is a bug. Nobody may wait for ever because of it: start afresh, in a while.
                self.failed_starts += 1
                unforeseen = not isinstance(error, EntrgiError)
                logger.error("%s failed (%d in a row): %s", self.name, self.failed_starts, error, exc_info=unforeseen)
                await self._bury()

    async def _launch(self) -> WorkerProcess:
        """Start a process, or take the spare one, and wait until it is ready."""
        spare = None if self._spare is None else await self._spare.take()
        self.worker = worker = spare or await WorkerProcess.spawn(self._config.worker_command)
        worker.send(frame(Configure(replace(self._config.worker, rank=self.rank))))
        limit = self._config.start_limit_seconds
        try:
            async with asyncio.timeout(limit):
                self.info = (await _until(worker, Ready)).info
                await self._adapt(worker)
        except BaseException as error:
            self.worker = None
            ended = await asyncio.shield(worker.reap())
            if isinstance(error, TimeoutError):
                raise EngineFailed(f"the worker was not ready within {limit:g} seconds") from error
            if isinstance(error, ChannelClosed):
                raise EngineFailed(f"the worker ended with {ended} while it loaded the models") from error
            raise
        self.failed_starts = 0
        self.ready = True
        logger.info("%s (process %d) is ready", self.name, worker.process.pid)
        self._engine.dispatch()
        return worker

    async def _adapt(self, worker: WorkerProcess) -> None:
        """Until a worker that has loaded its models has the adapters in the book, which may change meanwhile. Raises
        ConfigurationError when it refuses one."""
        book, told = self._engine.adapters, dict[str, str]()
        while told != book.folders:
            told = book.folders
            worker.send(frame(SetAdapters(told)))
            answer = await _until(worker, AdaptersSet)
            for version in answer.refused.keys() & book.folders.keys():
                raise ConfigurationError(f"lora: {version}: {answer.refused[version]}")

    async def _attend(self, worker: WorkerProcess) -> None:
        """Pass on what a ready worker says, until it dies."""
        watchdog = asyncio.create_task(self._watch(worker), name=f"watch {self.name}")
        try:
            if self._spare is not None:
                self._spare.refill()
            while True:
                match await worker.receive():
                    case Heartbeat(stats=stats):
                        self._present = stats
                    case WorkerError(message=message):
                        logger.error("%s gives up: %s", self.name, message)
                        break
                    case event:
                        self._engine.on_event(self, event)
        except ChannelClosed as error:
            logger.error("lost %s (process %d): %s", self.name, worker.process.pid, error)
        finally:
            watchdog.cancel()
        await self._bury()

    async def _bury(self) -> None:
        """The worker is dead, or is killed now; close its account, and tell the engine."""
        self.ready = False
        worker, self.worker = self.worker, None
        if worker is not None:
            logger.error("%s ended with %s", self.name, await worker.reap())
        self._past = self._past.plus(self._present.ended())
        self._present = RunnerStats()
        self._engine.on_lost(self)

    async def _watch(self, worker: WorkerProcess) -> None:
        """Kill a worker that makes no progress; notice one whose socket outlives it."""
        while not worker.exited():
            await asyncio.sleep(WATCH_SECONDS)
            if worker.silent_seconds() > self._config.watchdog_seconds:
                # We may be the ones who slept: let a heartbeat that waits in the socket be read first.
                await asyncio.sleep(WATCH_SECONDS)
                if worker.silent_seconds() > self._config.watchdog_seconds:
                    logger.error("%s made no progress for %.1f seconds", self.name, worker.silent_seconds())
                    worker.kill()
        worker.hang_up()


async def _ignore(worker: WorkerProcess) -> None:
    with contextlib.suppress(ChannelClosed):
        while True:
            await worker.receive()


async def _until(worker: WorkerProcess, kind: type[Told]) -> Told:
    """The next event of this kind from a worker that is not ready yet."""
    while True:
        event = await worker.receive()
        if isinstance(event, kind):
            return event
        if isinstance(event, WorkerError):
            raise (ConfigurationError if event.configuration else EngineFailed)(event.message)

"""Keeps one worker process alive: starts it, watches it, kills it when it hangs, starts the next when it
dies.

What a worker says goes to a `Listener`; so does the news of its death. The supervisor knows nothing of jobs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from server.errors import ConfigurationError, EngineFailed, EntrgiError
from server.types import EngineInfo
from server.wire.channel import ChannelClosed, FrontChannel
from server.wire.config import EngineConfig, WorkerConfig
from server.wire.messages import (
    Configure,
    Event,
    Heartbeat,
    ProtocolError,
    Ready,
    Shutdown,
    WorkerError,
    frame,
)

logger = logging.getLogger(__name__)

SOURCE_ROOT = Path(__file__).resolve().parents[2]
WATCH_SECONDS = 0.25


class Listener(Protocol):
    """Who wants to know. All are called on the event loop and must not block."""

    def on_ready(self, info: EngineInfo) -> None:
        """A worker can take work."""

    def on_event(self, event: Event) -> None:
        """It said something about a job, or its heart beat."""

    def on_death(self) -> None:
        """A worker that was ready is gone, with all it held."""

    def on_failed_start(self) -> None:
        """The next one did not get ready; `Supervisor.failed_starts` in a row did not."""


@dataclass(slots=True)
class WorkerHandle:
    """One worker process and our end of its channel."""

    process: subprocess.Popen[bytes]
    channel: FrontChannel
    step_seconds: float = 0.0  # of the step that was running when we last heard
    heard_at: float = field(default_factory=lambda: asyncio.get_running_loop().time())

    @classmethod
    async def spawn(cls, command: tuple[str, ...]) -> WorkerHandle:
        """Start the process; it waits for `Configure`. It gets no stdin, its own process group (so that a
        Ctrl-C in the terminal reaches only us) and no file but its end of the socket."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = _start_process(command, theirs.fileno())
        except OSError as error:
            ours.close()
            raise EngineFailed(f"the worker process cannot be started: {error}") from error
        try:
            return cls(process, await FrontChannel.open(ours))
        except BaseException:
            process.kill()
            process.wait()
            ours.close()
            raise

    async def receive(self) -> Event:
        """The next event; notes that the worker lives. Raises ChannelClosed and ProtocolError."""
        event = await self.channel.receive()
        self.heard_at = asyncio.get_running_loop().time()
        # Heartbeats come from a thread of their own; any other event shows that the loop itself goes on.
        self.step_seconds = event.step_seconds if isinstance(event, Heartbeat) else 0.0
        return event

    def silent_seconds(self) -> float:
        """Since when there is no sign of progress: no heartbeat, or a step that does not end."""
        return asyncio.get_running_loop().time() - self.heard_at + self.step_seconds

    def exited(self) -> bool:
        """Whether the process has ended. Leaves its exit status, and with it its id, in place for `reap`."""
        if self.process.returncode is not None:
            return True
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def kill(self) -> None:
        """Kill the process and whatever it started."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    async def reap(self, grace_seconds: float = 0.0) -> str:
        """Let it leave within the grace time, then kill it; returns how it ended, in words."""
        if grace_seconds > 0:
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self.process.wait, grace_seconds)
        self.kill()
        self.channel.close()
        status = await asyncio.to_thread(self.process.wait)
        return f"signal {-status}" if status < 0 else f"exit status {status}"


class Spare:
    """At most one process that has imported its code and waits to be told what to load, for the first worker that
    needs it: a restart without those seconds of importing."""

    def __init__(self, command: tuple[str, ...]) -> None:
        self._command = command
        self._worker: WorkerHandle | None = None
        self._filling = False
        self._stopped = False

    @property
    def pid(self) -> int | None:
        """The process id of the worker that stands by."""
        return None if self._worker is None else self._worker.process.pid

    async def refill(self) -> None:
        """Start one unless there is one. That it cannot be started is logged: the next restart is slower, no more."""
        if not self._needed():
            return
        self._filling = True
        try:
            worker = await WorkerHandle.spawn(self._command)
        except EngineFailed as error:
            logger.warning("no spare: %s", error)
            return
        finally:
            self._filling = False
        if self._stopped:  # meanwhile
            await worker.reap()
        else:
            self._worker = worker

    def _needed(self) -> bool:
        return self._worker is None and not self._filling and not self._stopped

    async def take(self) -> WorkerHandle | None:
        """The process, if it is there and lives."""
        worker, self._worker = self._worker, None
        if worker is not None and worker.exited():
            await worker.reap()
            return None
        return worker

    async def stop(self) -> None:
        """End it, and start no other."""
        self._stopped = True
        worker, self._worker = self._worker, None
        if worker is not None:
            await worker.reap()


class Supervisor:
    """One worker at a time, from `start` to `stop`."""

    def __init__(
        self, config: EngineConfig, worker: WorkerConfig, listener: Listener, spare: Spare | None = None
    ) -> None:
        self.config = config
        self.worker_config = worker
        self.listener = listener
        self.name = f"worker {worker.rank}"
        self.restarts = 0
        self.failed_starts = 0  # in a row
        self.ready = False
        self._worker: WorkerHandle | None = None
        self._spare = spare
        self._task: asyncio.Task[None] | None = None

    @property
    def worker_pid(self) -> int | None:
        """The process id of the present worker."""
        return None if self._worker is None else self._worker.process.pid

    @property
    def backoff_seconds(self) -> float:
        """How long the next start waits: not at all, unless workers keep dying before they are ready."""
        if self.failed_starts == 0:
            return 0.0
        doubled = self.config.backoff_seconds * 2.0 ** min(self.failed_starts - 1, 30)
        return min(doubled, self.config.max_backoff_seconds)

    async def start(self) -> EngineInfo:
        """Start the first worker and wait until it is ready. Raises ConfigurationError when a setting or a
        checkpoint is wrong, EngineFailed when the worker dies for another reason; nothing is left running
        then."""
        info = await self._launch()
        self._task = asyncio.create_task(self._supervise(), name="engine-supervisor")
        return info

    async def stop(self) -> None:
        """End the worker: by its own hand within the grace time, else by ours."""
        self.ready = False
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.channel.send(frame(Shutdown()))
            last_words = asyncio.create_task(_ignore(worker))  # it may have to say them before it can listen
            await worker.reap(self.config.stop_grace_seconds)
            await last_words

    def send(self, data: bytes) -> None:
        """Send a frame to a ready worker; without one, nothing (at `on_ready` everything is sent again)."""
        if self.ready and self._worker is not None:
            self._worker.channel.send(data)

    # -- a worker's life -------------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        while True:
            try:
                if self._worker is None:
                    await self._restart()
                else:
                    await self._attend(self._worker)
            except Exception:
                # A bug of ours. Nobody may wait for ever because of it: start afresh, not too fast.
                logger.exception("supervision failed; %s is replaced", self.name)
                self.failed_starts += 1
                await self._bury()

    async def _restart(self) -> None:
        await asyncio.sleep(self.backoff_seconds)
        self.restarts += 1
        try:
            await self._launch()
        except EntrgiError as error:
            self.failed_starts += 1
            logger.error("%s did not start (attempt %d): %s", self.name, self.failed_starts, error)
            self.listener.on_failed_start()

    async def _launch(self) -> EngineInfo:
        """Start a worker and wait until it is ready."""
        self._worker = worker = await self._take()
        worker.channel.send(frame(Configure(self.worker_config)))
        try:
            info = await asyncio.wait_for(_until_ready(worker), self.config.start_limit_seconds)
        except BaseException as error:
            self._worker = None
            ended = await asyncio.shield(worker.reap())
            if isinstance(error, TimeoutError):
                limit = self.config.start_limit_seconds
                raise EngineFailed(f"the worker was not ready within {limit:g} seconds") from error
            if isinstance(error, ChannelClosed | ProtocolError):
                raise EngineFailed(f"the worker ended with {ended} while it loaded the models") from error
            raise
        self.failed_starts = 0
        self.ready = True
        logger.info("%s (process %d) is ready", self.name, worker.process.pid)
        self.listener.on_ready(info)
        return info

    async def _take(self) -> WorkerHandle:
        """The spare process, if it lives, or a new one."""
        spare = await self._spare.take() if self._spare is not None else None
        return spare or await WorkerHandle.spawn(self.config.worker_command)

    async def _attend(self, worker: WorkerHandle) -> None:
        """Pass on what a ready worker says, until it dies."""
        watchdog = asyncio.create_task(self._watch(worker), name="engine-watchdog")
        try:
            if self._spare is not None:
                await self._spare.refill()
            while True:
                event = await worker.receive()
                if isinstance(event, WorkerError):
                    logger.error("%s gives up: %s", self.name, event.message)
                    break
                self.listener.on_event(event)
        except (ChannelClosed, ProtocolError) as error:
            logger.error("lost %s (process %d): %s", self.name, worker.process.pid, error)
        finally:
            watchdog.cancel()
        await self._bury()

    async def _bury(self) -> None:
        """The worker is dead, or is killed now; tell who should know."""
        self.ready = False
        worker, self._worker = self._worker, None
        if worker is not None:
            logger.error("%s ended with %s", self.name, await worker.reap())
        self.listener.on_death()

    async def _watch(self, worker: WorkerHandle) -> None:
        """Kill a worker that makes no progress; notice one whose socket outlives it."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if worker.silent_seconds() > self.config.watchdog_seconds:
                # We may be the ones who slept: let a heartbeat that waits in the socket be read first.
                await asyncio.sleep(WATCH_SECONDS)
                if worker.silent_seconds() > self.config.watchdog_seconds:
                    logger.error("%s made no progress for %.1f seconds", self.name, worker.silent_seconds())
                    worker.kill()
            if worker.exited():
                worker.channel.close()
                return


async def _ignore(worker: WorkerHandle) -> None:
    with contextlib.suppress(ChannelClosed, ProtocolError):
        while True:
            await worker.receive()


async def _until_ready(worker: WorkerHandle) -> EngineInfo:
    while True:
        match await worker.receive():
            case Ready(info=info):
                return info
            case WorkerError(message=message, configuration=True):
                raise ConfigurationError(message)
            case WorkerError(message=message):
                raise EngineFailed(message)
            case _:
                continue


def _start_process(command: tuple[str, ...], fd: int) -> subprocess.Popen[bytes]:
    # The child must find this very source tree, whatever its working directory.
    inherited = os.environ.get("PYTHONPATH")
    python_path = os.pathsep.join([str(SOURCE_ROOT), *([inherited] if inherited else [])])
    return subprocess.Popen(
        [*command, str(fd)],
        stdin=subprocess.DEVNULL,
        pass_fds=(fd,),
        env={**os.environ, "PYTHONPATH": python_path},
        process_group=0,
    )

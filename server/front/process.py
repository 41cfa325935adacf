"""A worker process, as the HTTP process handles it: started, told, heard, watched, killed. And the spare one."""

from __future__ import annotations

import asyncio
import logging
import subprocess

from server.errors import EngineFailed
from server.wire.child import Child
from server.wire.messages import EVENT, Event, Heartbeat, decode

logger = logging.getLogger(__name__)


class WorkerProcess(Child):
    """One worker process; it waits for `Configure`. The bounded number of jobs bounds what can wait to be sent, and
    what was lost with a worker is sent to the next one."""

    def __init__(
        self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        super().__init__(process, reader, writer)
        self._heard_at = asyncio.get_running_loop().time()
        self._step_seconds = 0.0  # of the step that was running when we last heard

    async def receive(self) -> Event:
        """The next event; notes that the worker lives. Raises ChannelClosed and ProtocolError."""
        event = decode(EVENT, await self.body())
        self._heard_at = asyncio.get_running_loop().time()
        # Heartbeats come from a thread of their own; any other event shows that the loop itself goes on.
        self._step_seconds = event.step_seconds if isinstance(event, Heartbeat) else 0.0
        return event

    def silent_seconds(self) -> float:
        """Since when there is no sign of progress: no heartbeat, or a step that does not end."""
        return asyncio.get_running_loop().time() - self._heard_at + self._step_seconds


class Spare:
    """At most one process that has imported its code and waits to be told what to load, for the first replica that
    needs it: a restart without those seconds of importing."""

    def __init__(self, command: tuple[str, ...]) -> None:
        self._command = command
        self._spawning: asyncio.Task[WorkerProcess] | None = None

    def refill(self) -> None:
        """Start one unless there is one."""
        if self._spawning is None:
            self._spawning = asyncio.create_task(WorkerProcess.spawn(self._command), name="spare worker")

    async def take(self) -> WorkerProcess | None:
        """The process, if it is there and lives. That it could not be started is logged: the restart is slower, no
        more."""
        spawning, self._spawning = self._spawning, None
        if spawning is None:
            return None
        try:
            worker = await spawning
        except EngineFailed as error:
            logger.warning("no spare: %s", error)
            return None
        if worker.exited():
            await worker.reap()
            return None
        return worker

    async def stop(self) -> None:
        """End it."""
        if (worker := await self.take()) is not None:
            await worker.reap()

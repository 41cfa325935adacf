"""A worker process, as the HTTP process handles it: started, told, heard, watched, killed. And the spare one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
from pathlib import Path

from server.errors import EngineFailed
from server.wire.messages import EVENT, LENGTH, ChannelClosed, Event, Heartbeat, body_length, decode

logger = logging.getLogger(__name__)

SOURCE_ROOT = Path(__file__).resolve().parents[2]


class WorkerProcess:
    """One worker process and our end of its socket."""

    def __init__(
        self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.process = process
        self._reader = reader
        self._writer = writer
        self._heard_at = asyncio.get_running_loop().time()
        self._step_seconds = 0.0  # of the step that was running when we last heard

    @classmethod
    async def spawn(cls, command: tuple[str, ...]) -> WorkerProcess:
        """Start the process; it waits for `Configure`. It gets no stdin, its own process group (so that a Ctrl-C in
        the terminal reaches only us) and no file but its end of the socket. Raises EngineFailed."""
        ours, theirs = socket.socketpair()
        # The child must find this very source tree, whatever its working directory.
        python_path = os.pathsep.join(filter(None, (str(SOURCE_ROOT), os.environ.get("PYTHONPATH"))))
        try:
            with theirs:
                process = subprocess.Popen(  # noqa: ASYNC220  (it does not wait for the process)
                    [*command, str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    env={**os.environ, "PYTHONPATH": python_path},
                    process_group=0,
                )
        except OSError as error:
            ours.close()
            raise EngineFailed(f"the worker process cannot be started: {error}") from error
        try:
            return cls(process, *await asyncio.open_unix_connection(sock=ours))
        except BaseException:
            process.kill()
            process.wait()
            ours.close()
            raise

    def send(self, data: bytes) -> None:
        """Queue a frame for sending; the bounded number of jobs bounds what can wait here. A frame for a dead
        worker is dropped: `receive` sees the death, and what was lost is sent to the next worker."""
        if not self._writer.is_closing():
            self._writer.write(data)

    async def receive(self) -> Event:
        """The next event; notes that the worker lives. Raises ChannelClosed and ProtocolError."""
        try:
            prefix = await self._reader.readexactly(LENGTH.size)
            event = decode(EVENT, await self._reader.readexactly(body_length(prefix)))
        except (asyncio.IncompleteReadError, OSError) as error:
            raise ChannelClosed("the worker closed its end") from error
        self._heard_at = asyncio.get_running_loop().time()
        # Heartbeats come from a thread of their own; any other event shows that the loop itself goes on.
        self._step_seconds = event.step_seconds if isinstance(event, Heartbeat) else 0.0
        return event

    def silent_seconds(self) -> float:
        """Since when there is no sign of progress: no heartbeat, or a step that does not end."""
        return asyncio.get_running_loop().time() - self._heard_at + self._step_seconds

    def exited(self) -> bool:
        """Whether the process has ended. Leaves its exit status, and with it its id, in place for `reap`."""
        if self.process.returncode is not None:
            return True
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def hang_up(self) -> None:
        """Close our end at once; a waiting `receive` raises ChannelClosed."""
        self._writer.transport.abort()

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
        self.hang_up()
        status = await asyncio.to_thread(self.process.wait)
        return f"signal {-status}" if status < 0 else f"exit status {status}"


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

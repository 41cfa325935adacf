"""A process of ours at the other end of a private socketpair, as the HTTP process handles it: started, told, heard,
killed. Workers are such processes (`front/process`), and so are those that run scorers' functions."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import Self

from server.errors import EngineFailed
from server.wire.messages import LENGTH, ChannelClosed, body_length

SOURCE_ROOT = Path(__file__).resolve().parents[2]


class Child:
    """One process and our end of its socket, which carries frames: four bytes of length, and that many."""

    def __init__(
        self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.process = process
        self._reader = reader
        self._writer = writer

    @classmethod
    async def spawn(cls, command: tuple[str, ...]) -> Self:
        """Start a process, which gets its socket's number as its last argument. It gets no stdin, its own process group
        (so that a Ctrl-C in the terminal reaches only us) and no file but its end of the socket. Raises
        EngineFailed."""
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
            raise EngineFailed(f"a process cannot be started: {error}") from error
        try:
            return cls(process, *await asyncio.open_unix_connection(sock=ours))
        except BaseException:
            process.kill()
            process.wait()
            ours.close()
            raise

    def send(self, data: bytes) -> None:
        """Queue a frame for sending. One for a dead process is dropped: whoever reads sees the death."""
        if not self._writer.is_closing():
            self._writer.write(data)

    async def body(self) -> bytes:
        """What the next frame holds. Raises ChannelClosed when the process has ended, and ProtocolError."""
        try:
            prefix = await self._reader.readexactly(LENGTH.size)
            return await self._reader.readexactly(body_length(prefix))
        except (asyncio.IncompleteReadError, OSError) as error:
            raise ChannelClosed("the process closed its end") from error

    def exited(self) -> bool:
        """Whether the process has ended. Leaves its exit status, and with it its id, in place for `reap`."""
        if self.process.returncode is not None:
            return True
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def hang_up(self) -> None:
        """Close our end at once; a waiting `body` raises ChannelClosed."""
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

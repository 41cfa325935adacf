"""The two ends of the private socketpair: blocking in the worker, asyncio in the HTTP process.

Both speak the frames of `wire/messages`. `ChannelClosed` means that the other process is gone.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterable

from server.wire.messages import (
    LENGTH,
    MAX_FRAME_BYTES,
    Event,
    ToWorker,
    body_length,
    decode_event,
    decode_to_worker,
    frame,
)

READ_BYTES = 256 * 2**10


class ChannelClosed(Exception):
    """The other end is closed: its process has ended, or has let go of us."""


class WorkerChannel:
    """The worker's end. One thread receives; any thread sends."""

    def __init__(self, sock: socket.socket, limit_bytes: int = MAX_FRAME_BYTES) -> None:
        self._socket = sock
        self._limit_bytes = limit_bytes
        self._buffer = bytearray()
        self._sending = threading.Lock()

    def send(self, events: Iterable[Event]) -> None:
        """Send events with one write. Raises FrameTooLarge or TypeError before anything is sent,
        ChannelClosed."""
        self.send_frames([frame(event, self._limit_bytes) for event in events])

    def send_frames(self, frames: Iterable[bytes]) -> None:
        """Send ready frames with one write. Raises ChannelClosed."""
        data = b"".join(frames)
        try:
            with self._sending:
                self._socket.sendall(data)
        except OSError as error:
            raise ChannelClosed(str(error)) from error

    def receive(self, *, block: bool) -> list[ToWorker]:
        """All messages that have arrived; with `block`, waits until there is at least one. Raises
        ChannelClosed and ProtocolError."""
        messages = self._whole_frames()
        while True:
            wait = block and not messages
            try:
                data = self._socket.recv(READ_BYTES, 0 if wait else socket.MSG_DONTWAIT)
            except BlockingIOError:
                return messages
            except OSError as error:
                raise ChannelClosed(str(error)) from error
            if not data:
                raise ChannelClosed("end of file")
            self._buffer += data
            messages += self._whole_frames()

    def _whole_frames(self) -> list[ToWorker]:
        messages: list[ToWorker] = []
        start = 0
        while len(self._buffer) - start >= LENGTH.size:
            body_start = start + LENGTH.size
            end = body_start + body_length(self._buffer[start:body_start], self._limit_bytes)
            if len(self._buffer) < end:
                break
            messages.append(decode_to_worker(bytes(self._buffer[body_start:end])))
            start = end
        del self._buffer[:start]
        return messages


class FrontChannel:
    """The HTTP process's end, on its event loop."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        limit_bytes: int = MAX_FRAME_BYTES,
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._limit_bytes = limit_bytes

    @classmethod
    async def open(cls, sock: socket.socket, limit_bytes: int = MAX_FRAME_BYTES) -> FrontChannel:
        """Take over a connected socket."""
        reader, writer = await asyncio.open_unix_connection(sock=sock)
        return cls(reader, writer, limit_bytes)

    def send(self, data: bytes) -> None:
        """Queue a frame for sending; the bounded number of jobs bounds what can wait here. A frame for a dead
        worker is dropped: the reader sees the death, and what was lost is sent to the next worker."""
        if not self._writer.is_closing():
            self._writer.write(data)

    async def receive(self) -> Event:
        """The next event. Raises ChannelClosed and ProtocolError."""
        try:
            prefix = await self._reader.readexactly(LENGTH.size)
            return decode_event(await self._reader.readexactly(body_length(prefix, self._limit_bytes)))
        except (asyncio.IncompleteReadError, OSError) as error:
            raise ChannelClosed("the worker closed its end") from error

    def close(self) -> None:
        """Close at once; a pending `receive` ends with ChannelClosed."""
        self._writer.transport.abort()

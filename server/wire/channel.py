"""The worker's end of the private socketpair; it blocks. (The HTTP process's end is asyncio's: `wire/child`.)"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterable

from server.wire.messages import LENGTH, TO_WORKER, ChannelClosed, Event, ToWorker, body_length, decode, frame

READ_BYTES = 256 * 2**10


class WorkerChannel:
    """Frames of `wire/messages` over a socket. One thread receives; any thread sends."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._buffer = bytearray()
        self._sending = threading.Lock()

    def send(self, events: Iterable[Event]) -> None:
        """Send events with one write. Raises FrameTooLarge or TypeError before anything is sent, ChannelClosed."""
        self.send_frames([frame(event) for event in events])

    def send_frames(self, frames: Iterable[bytes]) -> None:
        """Send ready frames with one write. Raises ChannelClosed."""
        data = b"".join(frames)
        try:
            with self._sending:
                self._socket.sendall(data)
        except OSError as error:
            raise ChannelClosed(str(error)) from error

    def receive(self, *, block: bool) -> list[ToWorker]:
        """All messages that have arrived; with `block`, waits until there is at least one. Raises ChannelClosed."""
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
            body = start + LENGTH.size
            end = body + body_length(self._buffer[start:body])
            if len(self._buffer) < end:
                break
            messages.append(decode(TO_WORKER, bytes(self._buffer[body:end])))
            start = end
        del self._buffer[:start]
        return messages

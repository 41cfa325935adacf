"""Server-sent events, byte by byte.

Lines end in LF, CRLF or CR and in nothing else. `str.splitlines`, and with it httpx's `iter_lines`, also splits at
U+2028, U+0085 and others, which may stand unescaped in JSON and would cut an event in two; so bytes are split here,
before they are decoded.
"""

from __future__ import annotations

from collections.abc import Iterator

DONE = b"[DONE]"


class EventParser:
    """Takes chunks of bytes as they come, gives the `data` of every finished event."""

    def __init__(self) -> None:
        self._buffer = b""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """The data of the events that `chunk` completes; comments and other fields are dropped."""
        self._buffer += chunk
        while True:
            line, found = self._line()
            if not found:
                return
            if line:
                name, _, value = line.partition(b":")
                if name == b"data":
                    self._data.append(value.removeprefix(b" "))
            elif self._data:
                data, self._data = b"\n".join(self._data), []
                yield data

    def _line(self) -> tuple[bytes, bool]:
        ends = [at for at in (self._buffer.find(b"\n"), self._buffer.find(b"\r")) if at >= 0]
        if not ends:
            return b"", False
        end = min(ends)
        width = 1
        if self._buffer[end : end + 1] == b"\r":
            if end + 1 == len(self._buffer):
                return b"", False  # an LF may follow in the next chunk
            width = 2 if self._buffer[end + 1 : end + 2] == b"\n" else 1
        line, self._buffer = self._buffer[:end], self._buffer[end + width :]
        return line, True

"""The journal of a run: what was asked and what came back.

It is a file of JSON lines that only grows: one line for each request that was answered, in the format of OpenAI's batch
output, with the request, the server and the seconds beside. So the same command goes on after a kill, and what was in
flight then is asked once more: a generation has no side effects.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import msgspec

from ..errors import ClientError

HEAD = b'{"id":"batch_req_'
"""How a line of the journal begins, by which one that a kill cut short is told from a line of another file."""
REFUSALS = frozenset({400, 413, 422})
"""Statuses that say that a request is wrong. Whatever else failed may succeed when it is asked again."""


@dataclass(frozen=True, slots=True)
class Request:
    """A line of OpenAI's batch input; `url` is the path."""

    custom_id: str
    url: str
    body: dict[str, Any]
    method: str = "POST"


def request(url: str, body: dict[str, Any]) -> Request:
    """A POST that is named by what it asks: equal requests have equal ids, whatever else a run asks."""
    said = msgspec.json.encode([url, body], order="sorted")
    return Request(sha256(said).hexdigest()[:32], url, body)


@dataclass(frozen=True, slots=True)
class Response:
    """What the server said."""

    status_code: int
    body: Any
    request_id: str | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """A line of the journal. `seconds` are those of the attempt that was answered, from sending to the last byte."""

    id: str
    custom_id: str
    response: Response
    request: Request
    server: str
    seconds: float
    error: None = None

    @property
    def refusal(self) -> str | None:
        """Why the request has no result; None where it has one."""
        if self.response.status_code < 400:
            return None
        body = self.response.body
        error = body.get("error") if isinstance(body, dict) else body
        message = error.get("message") if isinstance(error, dict) else error
        return f"{self.response.status_code}: {message}"


class Journal:
    """A file of records, for one run at a time. `done` are the requests that are not asked again: those with a result,
    and wrong ones. Opening it takes out a last line that a kill cut short, if it begins as a record does. Raises
    ClientError where the file cannot be opened, is another run's, or holds something else."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: set[str] = set()
        self._lines: dict[str, int] = {}  # the last one of each request, from 0
        self._count = self._bytes = 0
        try:
            self._file = path.open("ab", buffering=0)  # a line is one write, and a kill loses none that was written
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            _lock(self._file, path)
            with path.open("rb") as lines:
                for line in lines:
                    if line.endswith(b"\n"):
                        self._note(self._decode(line, _Outline, self._count), len(line))
                    elif not (line.startswith(HEAD) or HEAD.startswith(line)):
                        raise self._foreign(self._count, "it is neither whole nor the beginning of an answer")
                    else:
                        os.truncate(path, self._bytes)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, record: Record) -> None:
        """Write a record, which is then in the operating system's hands. Raises ClientError, and leaves the file as it
        was, where there is no room."""
        line = left = msgspec.json.encode(record) + b"\n"
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            os.truncate(self.path, self._bytes)
            raise self._unwritable(error) from None
        self._note(record, len(line))

    def records(self) -> Iterator[Record]:
        """The last record of each request, in the order of their answers."""
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines):
                record: Record = self._decode(line, Record, number)
                if self._lines[record.custom_id] == number:
                    yield record

    def _note(self, record: Record | _Outline, size: int) -> None:
        """A record is in the file."""
        self._lines[record.custom_id] = self._count
        self._count += 1
        self._bytes += size
        if (status := record.response.status_code) < 400 or status in REFUSALS:
            self.done.add(record.custom_id)

    def _decode(self, line: bytes, kind: type[Any], number: int) -> Any:
        try:
            return msgspec.json.decode(line, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:  # ValidationError is one
            raise self._foreign(number, error) from None

    def _foreign(self, number: int, why: object) -> ClientError:
        where = f"{self.path}, line {number + 1}, is not of a journal of answers"
        return ClientError(f"{where} ({why}); name another file, to begin one")

    def _unwritable(self, error: OSError) -> ClientError:
        return ClientError(f"{self.path} cannot be written: {error.strerror}")


class _Status(msgspec.Struct):
    status_code: int


class _Outline(msgspec.Struct):
    custom_id: str
    response: _Status


def _lock(file: IO[bytes], path: Path) -> None:
    """Keep other runs from the file as long as it is open, where the system can."""
    if os.name == "posix":
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ClientError(f"another run writes {path}: wait for its end, or name another file") from None
        except OSError:
            pass  # the file system has no locks

"""The lines of a batch: requests that come in, and what has come of each, which is on disk before it counts.

A line is known by its number in the file, from 1, with which the id of its result ends. So after a crash the results
themselves tell which lines have been answered.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from threading import Lock
from typing import Annotated, Any, Literal

from pydantic import Field

from server.api.body import parse
from server.api.rules import Strict
from server.api.store import sync_folder, synced
from server.api.values import Text
from server.errors import InvalidRequest

MAX_NAME = 512


class Line(Strict):
    """One request of a batch's file."""

    custom_id: Annotated[Text, Field(min_length=1, max_length=MAX_NAME)]
    """The client's name for it, which no other line of the file has"""
    method: Literal["POST"]
    url: Text
    """The endpoint of the batch"""
    body: dict[str, Any]
    """What the endpoint takes"""


def lines_of(path: Path, most: int) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank with their numbers. Of a line past `most` bytes one byte more than that is given."""
    with path.open("rb") as file:
        number = 0
        while data := file.readline(most + 1):
            number += 1
            rest = data
            while len(rest) > most and not rest.endswith(b"\n"):
                rest = file.readline(most + 1)
            if data.strip():
                yield number, data


def custom_id_of(value: object) -> str | None:
    """The client's name for a line, whatever else is wrong with the line."""
    name = value.get("custom_id") if isinstance(value, dict) else None
    return name if isinstance(name, str) and len(name) <= MAX_NAME else None


class Results:
    """What has come of a batch's lines: answers in one file, errors in the other. `numbers` are those of the lines that
    are done, and `counts` how many lines each file has. Ids of results begin with `prefix`. Methods may be called from
    any thread."""

    def __init__(self, prefix: str, answers: Path, errors: Path) -> None:
        self._prefix, self._paths = prefix, (answers, errors)
        self._lock = Lock()
        self._names: dict[str, int] = {}  # custom id -> the line to which it belongs
        self.numbers: set[int] = set()
        self.counts = [0, 0]
        for failed, path in enumerate(self._paths):
            for result in _whole_lines(path):
                self._count(int(result["id"].rpartition("_")[2]), result["custom_id"], failed)
        sync_folder(answers.parent)

    def add(self, entries: Iterable[tuple[int, str | None, dict[str, Any]]], *, failed: bool) -> None:
        """Write what has come of some lines (number, custom id, and `response` or `error`) of which nothing had come
        before; it is on disk when this returns."""
        with self._lock, self._paths[failed].open("ab") as file:
            fresh = []
            for number, name, result in entries:
                if number not in self.numbers:
                    told = {"id": f"{self._prefix}_{number}", "custom_id": name, "response": None, "error": None}
                    file.write(json.dumps(told | result).encode() + b"\n")
                    fresh.append((number, name))
            synced(file)
            for number, name in fresh:
                self._count(number, name, failed)

    def give_up(self, lines: Iterable[tuple[int, bytes]], code: str, message: str) -> None:
        """Write for each of the lines that is not done why it is not."""
        error = {"error": {"code": code, "message": message}}
        self.add(((number, _named(data), error) for number, data in lines), failed=True)

    def first(self, name: str, number: int) -> int:
        """The line to which this custom id belongs: `number`, unless another came first."""
        return self._names.setdefault(name, number)

    def _count(self, number: int, name: str | None, failed: int) -> None:
        self.numbers.add(number)
        self.counts[failed] += 1
        if name is not None and not failed:  # a line may have failed because the name is another's
            self.first(name, number)


def _named(data: bytes) -> str | None:
    try:
        return custom_id_of(parse(data))
    except InvalidRequest:
        return None


def _whole_lines(path: Path) -> Iterator[Any]:
    """The results in a file, which is made if it is not there; what a crash has left of one is cut off."""
    with path.open("a+b") as file:
        file.seek(0)
        end = 0
        for line in file:
            try:
                result = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                result = None
            if result is None:
                break
            yield result
            end += len(line)
        file.truncate(end)

"""Logs: one JSON object a line, or readable lines on a terminal. Never prompt text at INFO.

Every record carries the id of the request that it was made for. Control characters and anything else that could
forge a line are escaped in both formats, so no client can write a log line of its own.
"""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
about: ContextVar[dict[str, object] | None] = ContextVar("about", default=None)
"""What the access line of the present request will tell beside its path and status."""

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}
_TRACEBACK_CHARACTERS = 20_000


def note(**fields: object) -> None:
    """Let the access line of the present request tell this, too. Nothing that a client wrote belongs here."""
    if (told := about.get()) is not None:
        told.update(fields)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    """The request that a record was made for, and what `extra=` added to it."""
    identity = request_id.get()
    added = {key: value for key, value in vars(record).items() if key not in _STANDARD}
    return added if identity is None else {"request_id": identity} | added


class JSONFormatter(logging.Formatter):
    """One JSON object a line, ASCII only."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON."""
        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= _fields(record)
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)[-_TRACEBACK_CHARACTERS:]
        return json.dumps(entry, ensure_ascii=True, default=str)


class ConsoleFormatter(logging.Formatter):
    """`12:00:00.000 INFO message  key=value`, control characters escaped."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line, and its traceback below."""
        when = datetime.fromtimestamp(record.created).strftime("%H:%M:%S.%f")[:-3]
        pairs = "".join(f" {key}={value}" for key, value in _fields(record).items())
        line = _one_line(f"{when} {record.levelname} {record.getMessage()}{' ' if pairs else ''}{pairs}")
        if record.exc_info:
            traceback = self.formatException(record.exc_info)[-_TRACEBACK_CHARACTERS:]
            line += "".join(f"\n    {_one_line(each)}" for each in traceback.splitlines())
        return line


def _one_line(text: str) -> str:
    """`text` with everything unprintable escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def configure(level: str, form: Literal["auto", "json", "console"]) -> None:
    """Send all logging to standard error, once, at the composition root."""
    plain = form == "console" or (form == "auto" and sys.stderr.isatty())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(ConsoleFormatter() if plain else JSONFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = name != "uvicorn.access"  # our middleware logs requests, with their ids
    logging.getLogger("httpx").setLevel("WARNING")

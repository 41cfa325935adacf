"""Many requests to one or several servers, and a journal of what came back.

The journal is a file of JSON lines that only grows: one line for each request that was answered, in the format of
OpenAI's batch output, with the request, the server and the seconds beside. A request whose id stands in it is not sent
again, so the same command goes on after a kill, and what was in flight then is asked once more: a generation has no
side effects.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import msgspec
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from ..calls import error_of, headers, request_id
from ..errors import ClientError, ConnectionFailed
from ..retry import RetryPolicy, retry_after, sendable_again
from ..terminal import console

ATTEMPTS = 5
"""How often a request may fail in the server before its failure is its answer. A full or absent server fails nobody."""
BUSY = frozenset({429, 503})
ABSENT = frozenset({502, 503, 504})
"""What a proxy says of a server that is gone, and a server that is loading or draining of itself."""
REFUSED_KEY = frozenset({401, 403})
PATIENCE_SECONDS = 600.0
BACKOFF = RetryPolicy()
TIMEOUT = httpx.Timeout(3600.0, connect=5.0)


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


HEAD = b'{"id":"batch_req_'
"""How a line of the journal begins, by which one that a kill cut short is told from a line of another file."""


class Journal:
    """A file of records. Opening it takes out a last line that a kill cut short, if it begins as a record does. Raises
    ClientError where the file cannot be opened or holds something else."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: set[str] = set()
        whole = 0
        try:
            path.touch()
            with path.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    if line.endswith(b"\n"):
                        self.done.add(_decode(line, _Named, path, number).custom_id)
                        whole += len(line)
                    elif not (line.startswith(HEAD) or HEAD.startswith(line)):
                        raise _foreign(path, number, "it is neither whole nor the beginning of an answer")
            os.truncate(path, whole)
            self._file = path.open("ab", buffering=0)  # a line is one write, and a kill loses none that was written
        except OSError as error:
            raise ClientError(f"{path} cannot be written: {error.strerror}") from None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, record: Record) -> None:
        """Write a record, which is then in the operating system's hands."""
        self._file.write(msgspec.json.encode(record) + b"\n")
        self.done.add(record.custom_id)

    def records(self) -> Iterator[Record]:
        """All records, in the order of their answers."""
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                yield _decode(line, Record, self.path, number)


class _Named(msgspec.Struct):
    custom_id: str


def _decode(line: bytes, kind: type[Any], path: Path, number: int) -> Any:
    try:
        return msgspec.json.decode(line, type=kind)
    except msgspec.DecodeError as error:  # ValidationError is one
        raise _foreign(path, number, error) from None


def _foreign(path: Path, number: int, why: object) -> ClientError:
    return ClientError(
        f"{path}, line {number}, is not of a journal of answers ({why}); name another file, to begin one"
    )


@dataclass(frozen=True, slots=True)
class Servers:
    """Servers that answer alike, and the requests in flight at each: so many that it is busy, so few that its queue is
    short and that another server has work too. `transport` stands in for the network in tests."""

    urls: Sequence[str]
    concurrency: int
    api_key: str | None = None
    transport: httpx.AsyncBaseTransport | None = None

    def client(self, url: str) -> httpx.AsyncClient:
        """Connections to one of them; nothing is retried here."""
        return httpx.AsyncClient(
            base_url=url,
            headers=headers(self.api_key),
            timeout=TIMEOUT,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=self.concurrency),
            transport=self.transport,
        )


def answer_all(requests: Sequence[Request], journal: Journal, servers: Servers, what: str) -> None:
    """Ask whatever the journal does not hold yet. `what` names it beside the progress on standard error.

    A server that is full or gone is left alone for as long as it asks (`Retry-After`), or longer each time, while its
    requests go to whichever server is free; one that the server refuses has its refusal for an answer. Raises
    ClientError where a key is refused, or no server has answered for `PATIENCE_SECONDS`."""
    asyncio.run(_answer_all({each.custom_id: each for each in requests}, journal, servers, what))


async def _answer_all(requests: dict[str, Request], journal: Journal, servers: Servers, what: str) -> None:
    queue: asyncio.Queue[Request] = asyncio.Queue()
    for each in requests.values():
        if each.custom_id not in journal.done:
            queue.put_nowait(each)
    if queue.empty():
        return
    with _progress() as progress:
        task = progress.add_task(what, total=len(requests), completed=len(requests) - queue.qsize())
        run = _Run(queue, journal, lambda: progress.advance(task))
        try:
            async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
                clients = [await stack.enter_async_context(servers.client(url)) for url in servers.urls]
                places = enumerate(client for client in clients for _ in range(servers.concurrency))
                workers = [group.create_task(run.work(client, number)) for number, client in places]
                await queue.join()
                for worker in workers:
                    worker.cancel()
        except* ClientError as errors:
            raise errors.exceptions[0] from None


class _Run:
    """What the workers of a run share. `in_a_row` counts the failures since a worker's last answer, `failed` those of a
    request in servers that were there and not full."""

    def __init__(self, queue: asyncio.Queue[Request], journal: Journal, advance: Callable[[], None]) -> None:
        self.queue, self.journal, self.advance = queue, journal, advance
        self.failed: Counter[str] = Counter()
        self.in_a_row: dict[int, int] = {}
        self.last_heard = time.monotonic()

    async def work(self, client: httpx.AsyncClient, worker: int) -> None:
        """Send one request after the other, until the task is cancelled."""
        self.in_a_row[worker] = 0
        while True:
            asked = await self.queue.get()
            try:
                wait = await self._ask(client, asked, worker)
            finally:
                self.queue.task_done()
            if wait is not None:
                await asyncio.sleep(wait)

    async def _ask(self, client: httpx.AsyncClient, asked: Request, worker: int) -> float | None:
        """Have the request answered; or give it back and return the seconds to leave this server alone."""
        started, url = time.perf_counter(), str(client.base_url).rstrip("/")
        try:
            answer = await client.request(asked.method, asked.url, json=asked.body)
        except httpx.TransportError as error:
            failure = ConnectionFailed(f"no answer from {url}: {error or type(error).__name__}")
            return self._again(asked, {}, failure, worker)
        status = answer.status_code
        if status not in ABSENT:
            self.last_heard = time.monotonic()
        if status in REFUSED_KEY:
            raise error_of(answer)
        if status >= 400 and sendable_again(status, answer.headers):
            self.failed[asked.custom_id] += status not in BUSY
            if self.failed[asked.custom_id] < ATTEMPTS:
                return self._again(asked, answer.headers, error_of(answer), worker)
        self.in_a_row[worker] = 0
        response = Response(status, _body(answer), request_id(answer.headers))
        seconds = round(time.perf_counter() - started, 4)
        self.journal.add(Record(f"batch_req_{asked.custom_id}", asked.custom_id, response, asked, url, seconds))
        self.advance()
        return None

    def _again(self, asked: Request, said: Mapping[str, str], failure: ClientError, worker: int) -> float:
        """Give the request back; the seconds to wait. Raises `failure` where no server has been there for long."""
        if all(self.in_a_row.values()) and time.monotonic() - self.last_heard > PATIENCE_SECONDS:
            raise failure
        self.in_a_row[worker] += 1
        self.queue.put_nowait(asked)
        return retry_after(said) or BACKOFF.backoff(self.in_a_row[worker] - 1)


def _body(answer: httpx.Response) -> Any:
    try:
        return msgspec.json.decode(answer.content)
    except msgspec.DecodeError:  # a proxy's page
        return {"error": {"message": answer.text[:200] or f"HTTP status {answer.status_code}"}}


class _Rate(ProgressColumn):
    """Requests a second; a minute, where they are slow."""

    def render(self, task: Task) -> Text:
        speed = task.speed or 0.0
        return Text("" if not speed else f"{speed:.1f}/s" if speed >= 1 else f"{60 * speed:.1f}/min")


def _progress() -> Progress:
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(TextColumn("{task.description}"), *columns, console=console(stderr=True))

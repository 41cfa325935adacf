"""Many requests to one or several servers: each is answered once, whichever of them are full, gone or sick."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
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
from ..errors import ClientError, ConnectionFailed, UnexpectedResponse
from ..retry import RetryPolicy, retry_after, sendable_again
from ..terminal import console
from .journal import Journal, Record, Request, Response

ATTEMPTS = 5
"""How often a request may fail in servers before its failure is its answer, in each of them that is there."""
FULL, LOADING = 429, 503
UNKNOWN = frozenset({404, 405})
"""A server without the model or the path, which another one may have."""
REFUSED_KEY = frozenset({401, 403})
PATIENCE_SECONDS = 600.0
TELL_SECONDS = 60.0
BACKOFF = RetryPolicy()
CONNECT_SECONDS, LONGEST_SECONDS = 5.0, 3600.0
TIMEOUT = httpx.Timeout(LONGEST_SECONDS, connect=CONNECT_SECONDS)


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

    A server that is full, gone or sick is left alone for as long as it asks (`Retry-After`; a minute at most), or
    longer each time, while its requests go to whichever server is free; one that has kept a request for
    `PATIENCE_SECONDS` keeps it, but a free server is asked, too. A request that a server refuses has its refusal for an
    answer. Raises ClientError where a key is refused, the journal cannot be written, or no server has been there for
    `PATIENCE_SECONDS`."""
    asyncio.run(_answer_all({each.custom_id: each for each in requests}, journal, servers, what))


async def _answer_all(requests: dict[str, Request], journal: Journal, servers: Servers, what: str) -> None:
    left = {name: each for name, each in requests.items() if name not in journal.done}
    if not left:
        return
    with _progress() as progress:
        task = progress.add_task(what, total=len(requests), completed=len(requests) - len(left))
        run = _Run(left, journal, servers.urls, progress, progress.tasks[task])
        try:
            async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
                clients = [await stack.enter_async_context(servers.client(url)) for url in servers.urls]
                places = enumerate(
                    each for each in zip(servers.urls, clients, strict=True) for _ in range(servers.concurrency)
                )
                workers = [group.create_task(run.work(url, client, number)) for number, (url, client) in places]
                await run.over.wait()
                for worker in workers:
                    worker.cancel()
        except* ClientError as errors:
            raise errors.exceptions[0] from None


@dataclass(frozen=True, slots=True)
class _Flight:
    """A request that is being asked of a server, since when."""

    asked: Request
    url: str
    since: float


class _Run:
    """What the workers of a run share. `left` are the requests without an answer; `in_a_row` counts a worker's failures
    since its last answer, `failed` those of a request in each server that was there and not full; `away` are the
    servers that were not there when they were last asked, and since when; `silent` is since when none has been."""

    def __init__(
        self, left: dict[str, Request], journal: Journal, urls: Sequence[str], progress: Progress, task: Task
    ) -> None:
        self.left, self.journal, self.urls, self.progress, self.task = left, journal, urls, progress, task
        self.over = asyncio.Event()
        self.queue: asyncio.Queue[Request] = asyncio.Queue()
        for each in left.values():
            self.queue.put_nowait(each)
        self.flights: dict[int, _Flight] = {}  # of each worker
        self.failed: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.in_a_row: dict[int, int] = {}
        self.away: dict[str, float] = {}
        self.silent: float | None = None
        self.last_told = time.monotonic()

    async def work(self, url: str, client: httpx.AsyncClient, worker: int) -> None:
        """Send one request after the other, until the task is cancelled."""
        self.in_a_row[worker] = 0
        while True:
            asked = await self._next(url)
            self.flights[worker] = _Flight(asked, url, time.monotonic())
            wait = await self._ask(url, client, asked, worker)
            del self.flights[worker]
            if wait is not None:
                await asyncio.sleep(wait)

    async def _next(self, url: str) -> Request:
        """The next request; where there is none, one that another server has kept for long."""
        while True:
            try:
                async with asyncio.timeout(1.0):
                    return await self.queue.get()
            except TimeoutError:
                latest: dict[str, _Flight] = {flight.asked.custom_id: flight for flight in self.flights.values()}
                late = time.monotonic() - PATIENCE_SECONDS
                for name, flight in latest.items():
                    if name in self.left and flight.since < late and flight.url != url:
                        return flight.asked

    async def _ask(self, url: str, client: httpx.AsyncClient, asked: Request, worker: int) -> float | None:
        """Have the request answered; or give it back and return the seconds to leave this server alone."""
        started, name = time.perf_counter(), asked.custom_id
        try:
            answer = await client.request(asked.method, asked.url, json=asked.body)
        except httpx.RequestError as error:
            failure: ClientError = ConnectionFailed(f"no answer from {url}: {str(error) or type(error).__name__}")
            return self._again(asked, {}, self._gone(url, failure), worker)
        status, body = answer.status_code, _body(answer)
        if status in REFUSED_KEY:
            raise error_of(answer)
        again = status >= 400 and sendable_again(status, answer.headers)
        if body is None and (status < 400 or status > 500):
            failure = UnexpectedResponse(f"{url} answers with status {status} and a page: {answer.text[:100]!r}")
            return self._again(asked, answer.headers, self._gone(url, failure), worker)
        if again and status == LOADING:
            return self._again(asked, answer.headers, self._gone(url, error_of(answer)), worker)
        self._here(url)
        if again or status in UNKNOWN:
            if status != FULL:
                self.failed[name][url] += 1
            if not self._settled(name, ATTEMPTS if again else 1):
                return self._again(asked, answer.headers, error_of(answer), worker)
        self.in_a_row[worker] = 0
        self.failed.pop(name, None)
        if self.left.pop(name, None) is not None:  # else another server was faster
            body = {"error": {"message": answer.text[:200] or f"HTTP status {status}"}} if body is None else body
            seconds = round(time.perf_counter() - started, 4)
            said = Response(status, body, request_id(answer.headers))
            self.journal.add(Record(f"batch_req_{name}", name, said, asked, url, seconds))
            self._advance()
        return None

    def _settled(self, name: str, attempts: int) -> bool:
        """Whether a request has failed so often, and in every server but those that have been away for long."""
        failed, late = self.failed.get(name, Counter[str]()), time.monotonic() - PATIENCE_SECONDS
        return failed.total() >= attempts and all(failed[url] or self.away.get(url, late) < late for url in self.urls)

    def _again(self, asked: Request, said: Mapping[str, str], failure: ClientError, worker: int) -> float:
        """Give the request back; the seconds to wait. Raises `failure` where no server has been there for long, and
        none is at work, or none has ended any."""
        self.in_a_row[worker] += 1
        others = [flight for other, flight in self.flights.items() if other != worker]
        if asked.custom_id in self.left and all(flight.asked is not asked for flight in others):
            self.queue.put_nowait(asked)
        now = time.monotonic()
        self.silent = self.silent or now
        silence = now - self.silent - PATIENCE_SECONDS
        at_work = silence < LONGEST_SECONDS and any(now - flight.since > CONNECT_SECONDS for flight in others)
        if silence > 0 and not at_work:
            raise failure
        return min(retry_after(said) or BACKOFF.backoff(self.in_a_row[worker] - 1), TELL_SECONDS)

    def _gone(self, url: str, failure: ClientError) -> ClientError:
        """A server is not there."""
        if url not in self.away:
            self.away[url] = time.monotonic()
            self.progress.console.print(f"{failure}; it is asked again from time to time")
        return failure

    def _here(self, url: str) -> None:
        """A server is there."""
        self.silent = None
        if self.away.pop(url, None) is not None:
            self.progress.console.print(f"{url} answers again")

    def _advance(self) -> None:
        """A request has its answer. Where no bar can be drawn, a line tells of it every minute."""
        self.progress.advance(self.task.id)
        if not self.left:
            self.over.set()
        if not self.progress.console.is_terminal and time.monotonic() - self.last_told > TELL_SECONDS:
            self.last_told = time.monotonic()
            self.progress.console.print(f"{self.task.description}: {self.task.completed} of {self.task.total}")


def _body(answer: httpx.Response) -> dict[str, Any] | None:
    """The JSON object of an answer of the server's own; None for anything else, as a proxy's page or a redirection."""
    try:
        body = None if answer.is_redirect else msgspec.json.decode(answer.content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return body if isinstance(body, dict) else None


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

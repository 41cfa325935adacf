"""What the fault programs share: a server of their own, what its processes hold, and the verdict.

Each program is run as `python -m tests.faults.NAME`. It starts the server as a user would, on the bundled models and a
free port, and stops it. It prints a table, then one JSON line, and exits with 1 when a promise is broken.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from tests.support import serving
from tests.support.serving import Served

GAUGES = ("num_requests_running", "num_requests_waiting")
MEGABYTE = 2**20

# One step's batch never holds all of them, so that some wait.
SMALL = (*serving.QUICK, "--batch-trajectories", "16")


@dataclass(frozen=True)
class Usage:
    """What the HTTP process and the worker hold at one moment: resident megabytes, descriptors, threads."""

    front_mb: float
    worker_mb: float
    front_fds: int
    worker_fds: int
    front_threads: int
    worker_threads: int


class Server(Served):
    """A running server, and what its processes hold."""

    def worker_pid(self) -> int:
        """The process that holds the models: the child with the most memory."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return max((int(pid) for pid in children), key=_resident_mb)

    def usage(self) -> Usage:
        """What both processes hold now."""
        front, worker = self.process.pid, self.worker_pid()
        return Usage(
            *(_resident_mb(pid) for pid in (front, worker)),
            *(len(os.listdir(f"/proc/{pid}/fd")) for pid in (front, worker)),
            *(len(os.listdir(f"/proc/{pid}/task")) for pid in (front, worker)),
        )

    def errors_logged(self) -> list[str]:
        """Lines of the log that tell of an error."""
        return [line for line in self.log.read_text("utf-8").splitlines() if '"level": "ERROR"' in line]


def _resident_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return 0.0


@contextmanager
def served(*flags: str, module: str = "server") -> Iterator[Server]:
    """A server with these flags, ready; stopped at the end."""
    with serving.served("--log-format", "json", *SMALL, *flags, module=module) as server:
        yield Server(server.process, server.url, server.log)


# -- requests --------------------------------------------------------------------------------------------------


def client(server: Server, timeout: float = 120.0) -> httpx.AsyncClient:
    """A client that never waits for a free connection of its own."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=50)
    return httpx.AsyncClient(base_url=server.url, timeout=timeout, limits=limits)


def chat(seed: int, **fields: Any) -> dict[str, Any]:
    """A small seeded chat request."""
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": "Write a short review of a hotel."}],
        "max_tokens": 16,
        "seed": seed,
        "diffusion": {"steps": 8},
        "return_token_ids": True,
    }
    return {**body, **fields}


def answer_of(body: dict[str, Any]) -> Any:
    """What of an answer the seed decides: texts and tokens, not times and ids."""
    return [
        (choice.get("text") or choice.get("message", {}).get("content"), choice.get("token_ids"))
        for choice in body["choices"]
    ]


def joined(text: str) -> list[tuple[str, list[int] | None]]:
    """The same of a stream's text; raises ValueError when it does not end as it must, or ends with an error."""
    texts: dict[int, str] = {}
    tokens: dict[int, list[int] | None] = {}
    for data in serving.chunks_of(text):
        if "error" in data:
            raise ValueError(data["error"]["message"])
        for choice in data["choices"]:
            index, delta = choice["index"], choice.get("text") or choice.get("delta", {}).get("content") or ""
            texts[index] = texts.get(index, "") + delta
            tokens[index] = choice.get("token_ids") or tokens.get(index)
    return [(texts[index], tokens[index]) for index in sorted(texts)]


async def gauges(http: httpx.AsyncClient) -> float:
    """Requests that the server says are running or waiting."""
    text = (await http.get("/metrics")).text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.removeprefix("entrgi:") in GAUGES
    )


async def seconds_until(condition: Callable[[], Awaitable[bool]], limit: float) -> float:
    """How long until the condition holds; infinity when it does not within the limit."""
    started = time.monotonic()
    while time.monotonic() - started < limit:
        if await condition():
            return time.monotonic() - started
        await asyncio.sleep(0.1)
    return math.inf


async def seconds_until_idle(server: Server, limit: float = 60.0) -> float:
    """How long until the server holds no request."""
    async with client(server) as http:

        async def idle() -> bool:
            return await gauges(http) == 0

        return await seconds_until(idle, limit)


@dataclass
class Bystander:
    """A client that does nothing wrong: known seeded requests and /health, one after the other, while others misbehave.
    Run it as a task and cancel it; then `wrong` must be 0."""

    server: Server
    body: dict[str, Any] = field(default_factory=lambda: chat(7))
    pause: float = 0.2
    answers: int = 0
    refused: int = 0
    wrong: int = 0
    latencies: list[float] = field(default_factory=list)
    health: list[float] = field(default_factory=list)
    _first: Any = None

    @property
    def report(self) -> dict[str, float]:
        """Figures for the verdict."""
        return {
            "answers": self.answers,
            "wrong": self.wrong,
            "refused": self.refused,
            "p99_seconds": round(percentile(self.latencies, 99), 2),
            "health_p99_seconds": round(percentile(self.health, 99), 3),
        }

    async def ask(self, http: httpx.AsyncClient) -> None:
        """One request, compared with the first answer."""
        started = time.perf_counter()
        response = await http.post("/v1/chat/completions", json=self.body)
        if response.status_code == 429:
            self.refused += 1
            return
        response.raise_for_status()
        self.latencies.append(time.perf_counter() - started)
        answer = answer_of(response.json())
        if self._first is None:
            self._first = answer
        self.answers += 1
        self.wrong += answer != self._first

    async def run(self) -> None:
        """Until cancelled."""

        async def probe() -> None:
            async with client(self.server) as http:
                while True:
                    started = time.perf_counter()
                    (await http.get("/health")).raise_for_status()
                    self.health.append(time.perf_counter() - started)
                    await asyncio.sleep(0.1)

        async def ask() -> None:
            async with client(self.server) as http:
                while True:
                    await self.ask(http)
                    await asyncio.sleep(self.pause)

        await asyncio.gather(probe(), ask())


async def stop(task: asyncio.Task[Any]) -> None:
    """Cancel a task that runs for ever; raises what ended it before."""
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


# -- the verdict -----------------------------------------------------------------------------------------------


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0..100): the smallest value with at least q% at or below it; nan of nothing."""
    ranked = sorted(values)
    return ranked[max(math.ceil(q / 100 * len(ranked)) - 1, 0)] if ranked else math.nan


def quantiles(values: Sequence[float], *qs: float) -> dict[str, float]:
    """Percentiles by name."""
    return {f"p{q:g}": round(percentile(values, q), 3) for q in qs}


def growth_percent(samples: Sequence[float], warm_up: float = 0.25, window: float = 0.25) -> float:
    """By how much the median of the last `window` of the samples exceeds that of the `window` after the warm-up (both
    as shares of the whole), in percent. Medians, because single samples catch work in progress."""
    count = len(samples)
    size = max(1, int(count * window))
    first = samples[int(count * warm_up) :][:size]
    last = samples[-size:]
    return 100 * (statistics.median(last) / statistics.median(first) - 1)


def tenths(values: Sequence[float]) -> list[float]:
    """Means of ten equal parts."""
    size = max(1, len(values) // 10)
    return [round(sum(part) / len(part), 1) for i in range(10) if (part := values[i * size : (i + 1) * size])]


class Verdict:
    """Promises, with what was seen of each, and the figures that no promise shows."""

    def __init__(self, program: str) -> None:
        self.program = program
        self.figures: dict[str, Any] = {}
        self._promises: list[tuple[str, bool, str]] = []

    def promise(self, text: str, kept: bool, seen: object) -> None:
        """Record whether a promise was kept, and what was seen."""
        self._promises.append((text, kept, str(seen)))

    def bystander(self, what: str, seen: Bystander) -> None:
        """Promise that who did nothing wrong got the right answers."""
        self.promise(what, seen.answers > 0 and not seen.wrong, seen.report)

    def close(self, server: Server | None = None, idle: float = 0.0) -> int:
        """Print the table and the JSON line; with a server, first promise that it logged no error and was idle after
        `idle` seconds, at most ten. Returns the exit status."""
        if server is not None:
            errors = server.errors_logged()
            self.promise("slots are free within 10 s", idle <= 10, f"{idle:.1f} s")
            self.promise("no error logged", not errors, errors[:1])
        table = Table("promise", "seen", "kept", title=self.program)
        for text, kept, seen in self._promises:
            table.add_row(text, seen, "yes" if kept else "[bold red]NO[/]")
        console = Console(highlight=False, width=140)
        console.print(table)
        broken = [text for text, kept, _ in self._promises if not kept]
        promises = {text: seen for text, _, seen in self._promises}
        print(json.dumps({"program": self.program, "promises": promises, **self.figures, "broken": broken}))
        return 1 if broken else 0


def options(doc: str | None, **defaults: Any) -> argparse.Namespace:
    """The program's options: of each default's name and type (False: a switch; Path(): a file, none by default). The
    module's first line is the description."""
    arguments = argparse.ArgumentParser(
        description=(doc or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for name, default in defaults.items():
        how: dict[str, Any] = {"action": "store_true"} if default is False else {"type": type(default)}
        arguments.add_argument(f"--{name.replace('_', '-')}", default=default, help=" ", **how)
    return arguments.parse_args()

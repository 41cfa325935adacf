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
import re
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from tests.support import serving
from tests.support.serving import Served

GROWTH_PERCENT = 3.0  # by which memory that is flat may differ
# One step's batch never holds all of the clients' trajectories, so that some wait.
SMALL = (*serving.QUICK, "--batch-trajectories", "16")


@dataclass(frozen=True)
class Usage:
    """What the HTTP process and the first worker hold at one moment: resident megabytes, descriptors, threads."""

    front_mb: float
    worker_mb: float
    front_fds: int
    worker_fds: int
    front_threads: int
    worker_threads: int


class Server(Served):
    """A running server, and what is seen of its processes."""

    def worker_pids(self) -> dict[int, int]:
        """The process of each worker that was last said to be ready, from the server's log."""
        ready = re.findall(r"worker (\d+) \(process (\d+)\) is ready", self.log.read_text("utf-8"))
        return {int(worker): int(pid) for worker, pid in ready}

    def workers(self) -> tuple[float, dict[int, bool]]:
        """How often workers were restarted, and which are ready, of one moment."""
        restarts, ready = 0.0, {}
        for family in text_string_to_metric_families(self.client.get("/metrics").text):
            for sample in family.samples:
                if sample.name == "entrgi:worker_restarts_total":
                    restarts = sample.value
                elif sample.name == "entrgi:worker_ready":
                    ready[int(sample.labels["worker"])] = bool(sample.value)
        return restarts, ready

    def usage(self) -> Usage:
        """What both processes hold now."""
        pids = (self.process.pid, self.worker_pids()[0])
        resident = (int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
        held = (len(os.listdir(f"/proc/{pid}/{what}")) for what in ("fd", "task") for pid in pids)
        return Usage(*(pages * os.sysconf("SC_PAGE_SIZE") / 2**20 for pages in resident), *held)

    def errors_logged(self) -> list[str]:
        """Lines of the log that tell of an error."""
        return [line for line in self.log.read_text("utf-8").splitlines() if '"level": "ERROR"' in line]

    async def seconds_until_idle(self) -> float:
        """How long until the server holds no request; infinity when that takes more than a minute."""
        gauges = ("num_requests_running", "num_requests_waiting")
        return await seconds_until(lambda: not any(self.metric(name) for name in gauges), 60.0)


@contextmanager
def served(*flags: str, module: str = "server") -> Iterator[Server]:
    """A server with these flags, ready; stopped at the end."""
    with serving.served("--log-format", "json", *SMALL, *flags, module=module) as server:
        yield Server(server.process, server.url, server.log)


async def seconds_until(condition: Callable[[], bool], limit: float = 120.0, pause: float = 0.1) -> float:
    """How long until the condition holds; infinity when it does not within the limit. It is asked in a thread, so that
    clients go on meanwhile."""
    started = time.monotonic()
    while time.monotonic() - started < limit:
        if await asyncio.to_thread(condition):
            return time.monotonic() - started
        await asyncio.sleep(pause)
    return math.inf


@asynccontextmanager
async def meanwhile(endless: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Something that goes on for ever, until the block is left; raises what ended it before."""
    task = asyncio.create_task(endless)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@asynccontextmanager
async def watched(server: Server, pause: float) -> AsyncIterator[list[Usage]]:
    """What the processes hold: before the block, every `pause` seconds, and, when they have calmed down, after it. Both
    times with the connection over which the server is asked whether it is idle."""
    await server.seconds_until_idle()
    samples = [server.usage()]

    async def watch() -> None:
        while True:
            await asyncio.sleep(pause)
            samples.append(await asyncio.to_thread(server.usage))

    async with meanwhile(watch()):
        yield samples
    await server.seconds_until_idle()
    await asyncio.sleep(6)  # until connections that lingered are gone
    samples.append(server.usage())


# -- the verdict -----------------------------------------------------------------------------------------------


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0..100): the smallest value with at least q% at or below it; nan of nothing."""
    ranked = sorted(values)
    return ranked[max(math.ceil(q / 100 * len(ranked)) - 1, 0)] if ranked else math.nan


def quantiles(values: Sequence[float], *qs: float) -> dict[str, float]:
    """Percentiles by name."""
    return {f"p{q:g}": round(percentile(values, q), 3) for q in qs}


class Verdict:
    """Promises, with what was seen of each, and the figures that no promise shows."""

    def __init__(self, program: str, **figures: Any) -> None:
        self.program = program
        self.figures = figures
        self._promises: list[tuple[str, bool, str]] = []

    def promise(self, text: str, kept: bool, seen: object) -> None:
        """Record whether a promise was kept, and what was seen."""
        self._promises.append((text, kept, str(seen)))

    def flat(self, samples: Sequence[Usage]) -> None:
        """Promise that nothing adds up: the median memory of the last quarter is that of the second, after the warm-up;
        medians, because single samples catch work in progress. Descriptors follow the connections, so that those left
        at the end are compared with the most of the first quarter; so are threads."""
        quarter = max(1, len(samples) // 4)
        for name in (field.name for field in fields(Usage)):
            values = [getattr(sample, name) for sample in samples]
            if name.endswith("_mb"):
                growth = statistics.median(values[-quarter:]) / statistics.median(values[quarter:][:quarter] or values)
                seen = f"{growth - 1:+.2%}, {values[0]:.1f} -> {values[-1]:.1f}, {max(values):.1f} at most"
                self.promise(f"{name} flat within {GROWTH_PERCENT:g}%", growth <= 1 + GROWTH_PERCENT / 100, seen)
            else:
                first = max(values[:quarter])
                seen = f"{values[-1]} <= {first}, {max(values)} at most"
                self.promise(f"{name}: no more at the end than in the first quarter", values[-1] <= first, seen)

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
        Console(highlight=False, width=140).print(table)
        broken = [text for text, kept, _ in self._promises if not kept]
        promises = {text: seen for text, _, seen in self._promises}
        print(json.dumps({"program": self.program, "promises": promises, **self.figures, "broken": broken}))
        return 1 if broken else 0


def main(
    doc: str | None, run: Callable[..., Coroutine[Any, Any, int]], *flags: str, module: str = "server", **defaults: Any
) -> None:
    """A program: `run` with a server of these flags and the options of the command line, whose names and types are
    those of the defaults; options beyond these are the server's own. The first line of the module's text describes
    it."""
    arguments = argparse.ArgumentParser(
        description=(doc or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for name, default in defaults.items():
        arguments.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=" ")
    given, more = arguments.parse_known_args()
    with served(*flags, *more, module=module) as server:
        sys.exit(asyncio.run(run(server, **vars(given))))

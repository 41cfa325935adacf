"""`python -m tests.faults.kill_faults`: a worker that hangs, is stopped, raises, has no memory, or dies of a request.

Promised, each time under load: one answer to every request; a worker that makes no progress is found and replaced; an
error in one batch fails at most the requests in it, without a restart, and no later ones; a request that kills its
worker again and again gets a 503, and its neighbours get their tokens.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from collections import Counter
from typing import Any

from tests.faults.faulty_worker import Fault
from tests.faults.harness import Server, Verdict, chat, client, options, seconds_until, seconds_until_idle, served
from tests.faults.kill_worker import ready_workers, restarts_and_ready
from tests.faults.load import CHAT, Case, Load, ask, catalogue

LIMIT_SECONDS = 120.0


async def under_load(load: Load, event: Any) -> tuple[Any, Counter[str]]:
    """Do `event` while the load runs; its result, and the load's outcomes since."""
    already = len(load.requests)
    running = asyncio.create_task(load.run())

    async def busy() -> bool:
        return load.in_flight == load.clients

    await seconds_until(busy, LIMIT_SECONDS)
    await asyncio.sleep(random.uniform(0.2, 1.0))
    result = await event
    await asyncio.sleep(1.0)
    load.stopped = True
    await running
    return result, Counter(request.outcome for request in load.requests[already:])


async def faulty(server: Server, fault: Fault) -> str:
    """Send a request with a fault in it; its outcome."""
    async with client(server, timeout=300) as http:
        outcome, *_ = await ask(http, Case(CHAT, chat(int(fault))))
    return outcome


async def stopped_worker(server: Server) -> float:
    """SIGSTOP the worker; seconds until its successor is ready."""
    async with client(server) as http:
        before, _ = await restarts_and_ready(http)
        os.kill(ready_workers(server)[0], signal.SIGSTOP)
        started = time.monotonic()

        async def replaced() -> bool:
            restarts, ready = await restarts_and_ready(http)
            return restarts > before and all(ready.values())

        await seconds_until(replaced, LIMIT_SECONDS)
        return time.monotonic() - started


async def run(server: Server, verdict: Verdict, clients: int, watchdog: float, seed: int) -> None:
    """All of it, on one server."""
    load = Load(server, catalogue(2, seed, longest=16, fates=(1, 0, 0)), clients, seed)
    await load.learn()
    figures: dict[str, Any] = {}

    async def restarts() -> float:
        async with client(server) as http:
            return (await restarts_and_ready(http))[0]

    before = await restarts()
    seconds, outcomes = await under_load(load, stopped_worker(server))
    figures["SIGSTOP"] = {"seconds": seconds, "outcomes": dict(outcomes)}
    verdict.promise(
        "a stopped worker is replaced", seconds < watchdog + 15.0, f"{seconds:.1f} s, watchdog {watchdog:g}"
    )
    verdict.promise("nobody notices", set(outcomes) == {"right"}, outcomes)
    verdict.promise("by one restart", await restarts() == before + 1, await restarts() - before)

    for fault in (Fault.RAISE, Fault.EXHAUST_MEMORY):
        before = await restarts()
        outcome, outcomes = await under_load(load, faulty(server, fault))
        figures[fault.name] = {"outcome": outcome, "outcomes": dict(outcomes)}
        name = fault.name.lower()
        verdict.promise(f"{name}: the request gets its error", outcome.startswith("500"), outcome)
        verdict.promise(f"{name}: only its batch fails", _only_a_batch(outcomes, clients), outcomes)
        verdict.promise(f"{name}: without a restart", await restarts() == before, await restarts() - before)

    for fault in (Fault.DIE, Fault.HANG):
        before = await restarts()
        outcome, outcomes = await under_load(load, faulty(server, fault))
        figures[fault.name] = {"outcome": outcome, "outcomes": dict(outcomes)}
        name = fault.name.lower()
        verdict.promise(f"{name}: the request gets a 503", outcome == "503 unavailable", outcome)
        verdict.promise(f"{name}: its neighbours get their tokens", set(outcomes) == {"right"}, outcomes)
        deaths = await restarts() - before  # with others, with some of them, and twice alone
        verdict.promise(f"{name}: by two to four restarts", 2 <= deaths <= 4, deaths)

    verdict.promise("one answer to every request", len(load.requests) == load.sent, (len(load.requests), load.sent))
    verdict.promise("no wrong answer", not load.wrong, load.wrong[:3])
    idle = await seconds_until_idle(server)
    verdict.promise("idle afterwards", idle < LIMIT_SECONDS, f"{idle:.1f} s")
    verdict.figures = figures


def _only_a_batch(outcomes: Counter[str], clients: int) -> bool:
    failed = sum(count for name, count in outcomes.items() if name.startswith(("500", "stream ")))
    return failed <= clients and failed + outcomes["right"] == outcomes.total() and outcomes["right"] > clients


def main() -> int:
    """Run it; 0 when every promise was kept."""
    given = options(__doc__, clients=12, watchdog=10.0, seed=0)
    verdict = Verdict("kill_faults")
    flags = ("--dtype", "float64", "--device", "cpu", "--spare-worker", "--watchdog-seconds", str(given.watchdog))
    with served(*flags, module="tests.faults.faulty_server") as server:
        asyncio.run(run(server, verdict, given.clients, given.watchdog, given.seed))
    return verdict.close()


if __name__ == "__main__":
    sys.exit(main())

"""`python -m tests.faults.kill_faults`: a worker that hangs, is stopped, raises, has no memory, or dies of a request.

Promised, each time under load: one answer to every request; a worker that makes no progress is found and replaced; an
error in one batch fails at most the requests in it, without a restart, and no later ones; a request that kills its
worker again and again gets a 503, and its neighbours get their tokens.
"""

from __future__ import annotations

import asyncio
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from tests.faults.faulty_worker import Fault
from tests.faults.harness import Server, Verdict, main, seconds_until
from tests.faults.kill_worker import end_worker
from tests.faults.load import CHAT, EXACT, Case, Load, ask, catalogue, chat, client

WATCHDOG_SECONDS = 10.0


async def run(server: Server, clients: int, seed: int) -> int:
    """All of it, on one server."""
    load = Load(server, catalogue(2, seed, longest=16, fates=(1, 0, 0)), clients, seed)
    verdict = Verdict("kill_faults")
    await load.learn()

    async def under_load(event: Callable[[], Awaitable[Any]]) -> tuple[Any, Counter[str], float]:
        """What `event` gives that happens while the load runs, the load's outcomes since, and the restarts."""
        already, (before, _) = load.outcomes, server.workers()
        async with load.running():
            await seconds_until(lambda: load.in_flight == clients)
            await asyncio.sleep(random.uniform(0.2, 1.0))
            result = await event()
            await asyncio.sleep(1.0)
        return result, load.outcomes - already, server.workers()[0] - before

    async def faulty(fault: Fault) -> str:
        async with client(server) as http:
            return (await ask(http, Case(CHAT, chat(int(fault)))))[0]

    (_, seconds), outcomes, restarts = await under_load(lambda: end_worker(server, 0, signal.SIGSTOP))
    seen = f"{seconds:.1f} s, watchdog {WATCHDOG_SECONDS:g}"
    verdict.promise("a stopped worker is replaced", seconds < WATCHDOG_SECONDS + 15.0, seen)
    verdict.promise("nobody notices", set(outcomes) == {"right"}, outcomes)
    verdict.promise("by one restart", restarts == 1, restarts)

    for fault in Fault:
        outcome, outcomes, restarts = await under_load(lambda fault=fault: faulty(fault))
        name = fault.name.lower()
        if fault in (Fault.RAISE, Fault.EXHAUST_MEMORY):
            failed = sum(count for told, count in outcomes.items() if told.startswith(("500", "stream ")))
            right = outcomes["right"]
            batch = failed <= clients < right and failed + right == outcomes.total()
            verdict.promise(f"{name}: the request gets its error", outcome.startswith("500"), outcome)
            verdict.promise(f"{name}: only its batch fails", batch, outcomes)
            verdict.promise(f"{name}: without a restart", restarts == 0, restarts)
        else:
            verdict.promise(f"{name}: the request gets a 503", outcome == "503 worker_lost", outcome)
            verdict.promise(f"{name}: its neighbours get their tokens", set(outcomes) == {"right"}, outcomes)
            # It dies with others, with some of them, and twice alone.
            verdict.promise(f"{name}: by two to four restarts", 2 <= restarts <= 4, restarts)

    verdict.promise("one answer to every request", load.in_flight == 0, load.sent)
    verdict.promise("no wrong answer", not load.wrong, load.wrong[:3])
    idle = await server.seconds_until_idle()
    verdict.promise("idle within a minute", idle <= 60, f"{idle:.1f} s")
    return verdict.close()


if __name__ == "__main__":
    flags = (*EXACT, "--spare-worker", "--watchdog-seconds", str(WATCHDOG_SECONDS))
    main(__doc__, run, *flags, module="tests.faults.faulty_server", clients=12, seed=0)

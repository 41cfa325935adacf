"""`python -m tests.faults.kill_server`: SIGTERM under load, with time enough for the requests in flight, and without.

Promised: what was accepted is answered, to the token; new requests are refused with 503, and /ready is 503 while
/health is 200; the process ends within its grace time with exit status 0 and closes the connections that clients keep
alive; with too little time, what is left ends with an error and not with silence.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import sys
import time
from collections import Counter
from typing import Any

import httpx

from tests.faults.harness import Server, Verdict, client, options, seconds_until, served
from tests.faults.load import COMPLETIONS, Case, Load, ask, catalogue

# Beyond the grace time: for answers that are being written, and for the worker to leave by itself.
LAST_SECONDS = 5.0 + 5.0
LONG: dict[str, Any] = {"prompt": "Tell me", "max_tokens": 400, "best_of": 4, "guidance": {"method": "entrgi"}}


async def keep_alive(server: Server) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Ask once, and leave the connection open."""
    reader, writer = await asyncio.open_connection(server.host, server.port)
    writer.write(b"GET /ping HTTP/1.1\r\nHost: test\r\n\r\n")
    await reader.readuntil(b"}")
    return reader, writer


async def is_closed(reader: asyncio.StreamReader) -> bool:
    """Whether the server closes a kept connection within two seconds."""
    with contextlib.suppress(TimeoutError, ConnectionError):
        async with asyncio.timeout(2.0):
            return await reader.read() == b""
    return reader.at_eof()


async def until_exit(server: Server, limit: float) -> float:
    """Seconds of time.monotonic() at which the process has ended."""
    give_up_at = time.monotonic() + limit
    while server.process.poll() is None:
        if time.monotonic() > give_up_at:
            raise RuntimeError(f"the server has not ended within {limit:g} seconds")
        await asyncio.sleep(0.02)
    return time.monotonic()


async def probes(server: Server, seen: Counter[str]) -> None:
    """Ask /ready and /health until nobody answers any more."""
    async with client(server) as http:
        while True:
            try:
                for path in ("/ready", "/health"):
                    seen[f"{path} {(await http.get(path)).status_code}"] += 1
            except httpx.TransportError:
                return
            await asyncio.sleep(0.05)


async def enough_time(server: Server, verdict: Verdict, clients: int, grace: float, seed: int) -> None:
    """Requests that finish within the grace time."""
    cases = [case for case in catalogue(2, seed, fates=(1, 0, 0)) if case.path != "/tokenize"]  # answered to the last
    load = Load(server, cases, clients, seed)
    await load.learn()
    running = asyncio.create_task(load.run())
    await asyncio.sleep(random.Random(seed).uniform(2.0, 5.0))

    async def busy() -> bool:
        return load.in_flight > clients // 2

    await seconds_until(busy, 60.0)
    kept = [await keep_alive(server) for _ in range(8)]
    in_flight = load.in_flight
    server.process.send_signal(signal.SIGTERM)
    signalled = time.monotonic()
    seen: Counter[str] = Counter()
    watching = asyncio.create_task(probes(server, seen))
    ended = await until_exit(server, grace + 60.0)
    load.stopped = True
    await running
    await watching
    closed = [await is_closed(reader) for reader, _ in kept]
    before = Counter(each.outcome for each in load.requests if each.began < signalled)
    at_signal = Counter(each.outcome for each in load.requests if each.began < signalled <= each.ended)
    after = Counter(each.outcome for each in load.requests if each.began >= signalled)
    # One that was still on its way to us when the signal came may be refused: it was not accepted.
    lost = {name: count for name, count in before.items() if name not in ("right", "503 draining")}
    gone = {"ConnectError", "RemoteProtocolError", "ReadError", "503 draining"}
    status = server.process.returncode
    verdict.promise("no accepted request is lost", not lost and at_signal["right"] >= 1, f"{in_flight}: {at_signal}")
    verdict.promise("no wrong answer", not load.wrong, load.wrong[:3])
    verdict.promise("new requests are refused with 503", after["503 draining"] > 0 and set(after) <= gone, after)
    verdict.promise("/ready turns 503", seen["/ready 503"] > 0 and seen["/ready 200"] <= 1, seen)
    verdict.promise("/health stays 200", seen["/health 200"] > 0 and seen["/health 503"] == 0, seen)
    limit = grace + LAST_SECONDS
    verdict.promise("ends within the grace time", ended - signalled <= limit, f"{ended - signalled:.2f} s of {limit:g}")
    verdict.promise("exit status 0", status == 0, status)
    verdict.promise("connections kept alive are closed", all(closed), closed)
    verdict.figures["enough time"] = {
        "before": dict(before), "at_signal": dict(at_signal), "after": dict(after), "seconds": ended - signalled,
    }  # fmt: skip


async def too_little_time(server: Server, verdict: Verdict, clients: int, grace: float) -> None:
    """Requests that take far longer than the grace time."""

    async def one(http: httpx.AsyncClient, number: int) -> str:
        return (await ask(http, Case(COMPLETIONS, {**LONG, "seed": number, "stream": number % 2 == 1})))[0]

    async with client(server, timeout=300) as http:
        asked = [asyncio.create_task(one(http, number)) for number in range(clients)]
        await asyncio.sleep(3.0)
        unfinished = [task for task in asked if not task.done()]
        server.process.send_signal(signal.SIGTERM)
        signalled = time.monotonic()
        ended = await until_exit(server, grace + 60.0)
        outcomes = Counter(await asyncio.gather(*unfinished))
    limit = grace + LAST_SECONDS
    told = {"503 draining", "stream draining", "answer"}
    status = server.process.returncode
    verdict.promise("what is left ends with an error", len(unfinished) > 0 and set(outcomes) <= told, outcomes)
    verdict.promise(
        "ends soon after a short grace", ended - signalled <= limit, f"{ended - signalled:.2f} s of {limit:g}"
    )
    verdict.promise("exit status 0 then too", status == 0, status)
    verdict.figures["too little time"] = {"outcomes": dict(outcomes), "seconds": ended - signalled}


def main() -> int:
    """Run it; 0 when every promise was kept."""
    given = options(__doc__, clients=12, grace=60.0, seed=0)
    verdict = Verdict("kill_server")
    exact = ("--dtype", "float64", "--device", "cpu")
    with served(*exact, "--drain-seconds", str(given.grace)) as server:
        asyncio.run(enough_time(server, verdict, given.clients, given.grace, given.seed))
    with served(*exact, "--drain-seconds", "1") as server:
        asyncio.run(too_little_time(server, verdict, given.clients, 1.0))
    return verdict.close()


if __name__ == "__main__":
    sys.exit(main())

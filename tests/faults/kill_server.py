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

from tests.faults.harness import Server, Verdict, client, parser, seconds_until, served
from tests.faults.kill_load import COMPLETIONS, Case, Load, ask, catalogue

# Beyond the grace time: for answers that are being written, and for the worker to leave by itself.
LAST_SECONDS = 5.0 + 5.0
LONG: dict[str, Any] = {"prompt": "Tell me", "max_tokens": 400, "best_of": 4, "guidance": {"method": "entrgi"}}


class KeptAlive:
    """A connection that a client keeps open after an answer."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, server: Server) -> KeptAlive:
        """Ask once, and stay."""
        reader, writer = await asyncio.open_connection(server.host, server.port)
        writer.write(b"GET /ping HTTP/1.1\r\nHost: test\r\n\r\n")
        await reader.readuntil(b"}")
        return cls(reader, writer)

    async def is_closed(self) -> bool:
        """Whether the server closes it within two seconds."""
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(2.0):
                return await self._reader.read() == b""
        return self._reader.at_eof()


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
    load = Load(server, catalogue(36, seed), clients, seed)
    await load.learn()
    running = asyncio.create_task(load.run())
    await asyncio.sleep(random.Random(seed).uniform(2.0, 5.0))

    async def busy() -> bool:
        return load.in_flight > clients // 2

    await seconds_until(busy, 60.0)
    kept = [await KeptAlive.open(server) for _ in range(8)]
    in_flight = load.in_flight
    server.process.send_signal(signal.SIGTERM)
    signalled = time.monotonic()
    seen: Counter[str] = Counter()
    watching = asyncio.create_task(probes(server, seen))
    ended = await until_exit(server, grace + 60.0)
    load.stop()
    await running
    await watching
    closed = [await each.is_closed() for each in kept]
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

    async def one(http: httpx.AsyncClient, number: int) -> tuple[str, Any]:
        return await ask(http, Case(COMPLETIONS, {**LONG, "seed": number, "stream": number % 2 == 1}))

    async with client(server, timeout=300) as http:
        asked = [asyncio.create_task(one(http, number)) for number in range(clients)]
        await asyncio.sleep(3.0)
        unfinished = [task for task in asked if not task.done()]
        server.process.send_signal(signal.SIGTERM)
        signalled = time.monotonic()
        ended = await until_exit(server, grace + 60.0)
        answers = await asyncio.gather(*unfinished)
    outcomes = Counter(outcome for outcome, _ in answers)
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
    arguments = parser(__doc__)
    arguments.add_argument("--clients", type=int, default=12)
    arguments.add_argument("--grace", type=float, default=60.0, help="drain_seconds; default: %(default)s")
    arguments.add_argument("--seed", type=int, default=0)
    given = arguments.parse_args()
    verdict = Verdict("kill_server")
    exact = ("--dtype", "float64", "--device", "cpu")
    with served(*exact, "--drain-seconds", str(given.grace)) as server:
        asyncio.run(enough_time(server, verdict, given.clients, given.grace, given.seed))
    with served(*exact, "--drain-seconds", "1") as server:
        asyncio.run(too_little_time(server, verdict, given.clients, 1.0))
    return verdict.close()


if __name__ == "__main__":
    sys.exit(main())

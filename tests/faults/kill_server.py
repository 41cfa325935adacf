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
import time
from collections import Counter
from typing import Any

import httpx

from tests.faults.harness import Server, Verdict, main, seconds_until, served
from tests.faults.load import COMPLETIONS, EXACT, Case, Load, ask, catalogue, client

GRACE_SECONDS, SHORT_GRACE_SECONDS = 60.0, 1.0
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


async def end(server: Server, verdict: Verdict, what: str, grace: float) -> None:
    """SIGTERM, and the promises about the process."""
    server.process.send_signal(signal.SIGTERM)
    seconds = await seconds_until(lambda: server.process.poll() is not None, grace + 60.0, pause=0.02)
    limit, status = grace + LAST_SECONDS, server.process.poll()
    verdict.promise(f"{what}: ends within the grace time", seconds <= limit, f"{seconds:.2f} s of {limit:g}")
    verdict.promise(f"{what}: exit status 0", status == 0, status)


async def enough_time(server: Server, verdict: Verdict, clients: int, seed: int) -> None:
    """Requests that finish within the grace time."""
    cases = [case for case in catalogue(2, seed, fates=(1, 0, 0)) if case.path != "/tokenize"]  # answered to the last
    load = Load(server, cases, clients, seed)
    await load.learn()
    seen: Counter[str] = Counter()
    async with load.running():
        await asyncio.sleep(random.Random(seed).uniform(2.0, 5.0))
        await seconds_until(lambda: load.in_flight > clients // 2)
        kept = [await keep_alive(server) for _ in range(8)]
        in_flight = load.in_flight
        signalled = time.monotonic()
        await asyncio.gather(probes(server, seen), end(server, verdict, "enough time", GRACE_SECONDS))
    closed = [await is_closed(reader) for reader, _ in kept]
    before = Counter(each.outcome for each in load.requests if each.began < signalled)
    at_signal = Counter(each.outcome for each in load.requests if each.began < signalled <= each.ended)
    after = Counter(each.outcome for each in load.requests if each.began >= signalled)
    # One that was still on its way to us when the signal came may be refused: it was not accepted.
    lost = {name: count for name, count in before.items() if name not in ("right", "503 draining")}
    gone = {"ConnectError", "RemoteProtocolError", "ReadError", "503 draining"}
    verdict.promise("no accepted request is lost", not lost and at_signal["right"] >= 1, f"{in_flight}: {at_signal}")
    verdict.promise("no wrong answer", not load.wrong, load.wrong[:3])
    verdict.promise("new requests are refused with 503", after["503 draining"] > 0 and set(after) <= gone, after)
    verdict.promise("/ready turns 503", seen["/ready 503"] > 0 and seen["/ready 200"] <= 1, seen)
    verdict.promise("/health stays 200", seen["/health 200"] > 0 and seen["/health 503"] == 0, seen)
    verdict.promise("connections kept alive are closed", all(closed), closed)


async def too_little_time(server: Server, verdict: Verdict, clients: int) -> None:
    """Requests that take far longer than the grace time."""
    async with client(server) as http:
        cases = [Case(COMPLETIONS, {**LONG, "seed": number, "stream": number % 2 == 1}) for number in range(clients)]
        asked = [asyncio.create_task(ask(http, case)) for case in cases]
        await asyncio.sleep(3.0)
        unfinished = [task for task in asked if not task.done()]
        await end(server, verdict, "too little time", SHORT_GRACE_SECONDS)
        outcomes = Counter(outcome for outcome, *_ in await asyncio.gather(*unfinished))
    told = {"503 draining", "stream draining", "answer"}
    verdict.promise("what is left ends with an error", len(unfinished) > 0 and set(outcomes) <= told, outcomes)


async def run(server: Server, clients: int, seed: int) -> int:
    """Both, the second on a server of its own."""
    verdict = Verdict("kill_server")
    await enough_time(server, verdict, clients, seed)
    with served(*EXACT, "--drain-seconds", str(SHORT_GRACE_SECONDS)) as other:
        await too_little_time(other, verdict, clients)
    return verdict.close()


if __name__ == "__main__":
    main(__doc__, run, *EXACT, "--drain-seconds", str(GRACE_SECONDS), clients=12, seed=0)

"""`python -m tests.faults.slow`: clients that take their time, and requests that mean harm.

Slow senders dribble headers and bodies; slow readers ask for long streams and large answers and read a byte a second,
or nothing. The server's limits are set to a few seconds here. Each of them must be cut off or served, what they held
must be freed, memory must stay bounded meanwhile, and a client that behaves must not notice. Then the table of hostile
requests (`tests.faults.hostile`) is sent, each with the answer that it must get.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
from tqdm import tqdm

from tests.faults import hostile
from tests.faults.harness import (
    Bystander,
    Server,
    Verdict,
    chat,
    options,
    seconds_until_idle,
    served,
    stop,
)

LIMIT_SECONDS = 5.0
FLAGS = ("--slow-client-seconds", str(LIMIT_SECONDS), "--idle-connection-seconds", "5")
# Twice a look apart, plus the grace that lets the application answer, plus a busy machine.
CUT_SECONDS = 4 * LIMIT_SECONDS
LAST_SECONDS = 60.0  # for an answer that is still being made
MEMORY_MB = 100.0  # unread answers of all slow readers at once; each holds at most its own
BEYOND_THE_KERNEL_MB = 200.0  # the same of a few larger ones


async def connect(server: Server, small_window: bool = False) -> socket.socket:
    """A connected socket; with a small window, one whose kernel takes little that is not read."""
    sock = socket.socket()
    if small_window:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, (server.host, server.port))
    return sock


async def dribble(server: Server, start: bytes, pause: float = 0.4) -> tuple[float, int]:
    """Send the start, then a byte at a time. Returns when the server had enough (infinity: not within the time), and
    the status that it gave."""
    loop = asyncio.get_running_loop()
    sock = await connect(server)
    began = time.monotonic()
    received = b""
    try:
        with contextlib.suppress(OSError):
            await loop.sock_sendall(sock, start)
        while time.monotonic() - began < CUT_SECONDS:
            try:
                async with asyncio.timeout(pause):
                    data = await loop.sock_recv(sock, 65_536)
                if not data:
                    return time.monotonic() - began, _status(received)
                received += data
            except TimeoutError:
                with contextlib.suppress(OSError):
                    await loop.sock_sendall(sock, b"x")
            except OSError:
                return time.monotonic() - began, _status(received)
        return math.inf, _status(received)
    finally:
        sock.close()


def _status(received: bytes) -> int:
    match = re.match(rb"HTTP/1\.1 (\d{3})", received)
    return int(match[1]) if match else 0


async def sip(server: Server, request: bytes, bytes_a_second: int, patience: float = CUT_SECONDS) -> tuple[float, str]:
    """Ask, read that slowly for a while, then see what is left. Returns when it was over (infinity: the server held
    on), and how: cut (a reset), or ended (the server had written everything, and the kernel held it)."""
    loop = asyncio.get_running_loop()
    sock = await connect(server, small_window=True)
    began = time.monotonic()
    try:
        await loop.sock_sendall(sock, request)
        while time.monotonic() - began < patience:
            await asyncio.sleep(1.0)
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                return time.monotonic() - began, "cut"
            if bytes_a_second:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1.0):
                        await loop.sock_recv(sock, bytes_a_second)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_SECONDS):
                while await loop.sock_recv(sock, 65_536):
                    pass
                return time.monotonic() - began, "ended"
        return math.inf, "held"
    except OSError:
        return time.monotonic() - began, "cut"
    finally:
        sock.close()


@asynccontextmanager
async def memory_watched(server: Server) -> AsyncIterator[list[float]]:
    """Resident megabytes of the HTTP process, several times a second."""
    samples = [server.usage().front_mb]

    async def watch() -> None:
        while True:
            samples.append(server.usage().front_mb)
            await asyncio.sleep(0.2)

    task = asyncio.create_task(watch())
    try:
        yield samples
    finally:
        await stop(task)


async def part(
    verdict: Verdict, server: Server, name: str, clients: int, one: Callable[[], Awaitable[tuple[float, Any]]],
    allowed: set[Any], memory_mb: float = MEMORY_MB,
) -> None:  # fmt: skip
    """So many clients of a kind at once, beside one that behaves."""
    bystander = Bystander(server)
    watching = asyncio.create_task(bystander.run())
    before = server.usage()
    async with memory_watched(server) as memory:
        outcomes = await asyncio.gather(*(one() for _ in range(clients)))
    await stop(watching)
    idle = await seconds_until_idle(server)
    await asyncio.sleep(6)  # idle connections are closed after 5
    after = server.usage()
    ends = sorted({str(end) for _, end in outcomes})
    slowest = max(seconds for seconds, _ in outcomes)
    grown = max(memory) - memory[0]
    kept = slowest < math.inf and {end for _, end in outcomes} <= allowed
    verdict.promise(f"{name}: all cut or served", kept, f"{ends} within {slowest:.1f} s")
    verdict.promise(f"{name}: memory bounded", grown <= memory_mb, f"{grown:+.1f} MB at most")
    verdict.promise(f"{name}: descriptors and slots back", after.front_fds <= before.front_fds and idle <= 10,
                    f"{before.front_fds} -> {after.front_fds}, idle after {idle:.1f} s")  # fmt: skip
    verdict.bystander(f"{name}: others got right answers", bystander)


def expected(case: hostile.Hostile, reply: hostile.Reply) -> str | None:
    """What is wrong with an answer to a hostile request, or None."""
    if reply.status not in case.statuses:
        return f"status {reply.status}"
    if case.closes and not reply.closed:
        return "the connection stays open"
    return hostile.fault(reply)


async def table(verdict: Verdict, server: Server) -> None:
    """Every hostile request by itself, a known request after each."""
    bystander = Bystander(server)
    wrong: dict[str, str] = {}
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        for case in tqdm(list(hostile.requests()), desc="hostile requests", mininterval=2):
            linger = 3.0 if case.closes else 0.0
            reply = await hostile.exchange(server.port, case.data, linger=linger)
            if (what := expected(case, reply)) is not None:
                wrong[case.name] = what
            await bystander.ask(http)
    verdict.promise("every hostile request got its answer", not wrong, wrong or f"{bystander.answers} requests")
    verdict.bystander("and the next client its own", bystander)


async def run(server: Server, clients: int) -> int:
    """Slow senders, slow readers, the table."""
    body = json.dumps(chat(1)).encode()
    head = hostile.post(b"", f"Content-Length: {len(body)}", path="/v1/chat/completions", length=False)
    too_big = hostile.post(b"", "Content-Length: 99999999", length=False)
    length = {"max_tokens": 256, "diffusion": {"steps": 64}, "ignore_eos": True}
    stream = hostile.post(json.dumps(chat(2, stream=True, stream_canvas=True, **length)).encode(),
                          path="/v1/chat/completions")  # fmt: skip
    large, larger = (
        hostile.post(json.dumps({"prompt": "word " * words, "return_token_strs": True}).encode(), path="/tokenize")
        for words in (50_000, 250_000)
    )
    verdict = Verdict("slow")
    print("senders", file=sys.stderr)
    await part(verdict, server, "headers byte by byte", clients, lambda: dribble(server, head[:20]), {408})
    await part(verdict, server, "nothing sent", clients, lambda: dribble(server, b"", pause=60), {0})
    await part(verdict, server, "bodies byte by byte", clients, lambda: dribble(server, head + body[:5]), {0, 408})
    await part(verdict, server, "bodies that go on after 413", clients, lambda: dribble(server, too_big), {413})
    print("readers", file=sys.stderr)
    readers = max(clients // 5, 1)
    ends = {"cut", "ended"}
    await part(verdict, server, "streams, nothing read", readers, lambda: sip(server, stream, 0), ends)
    await part(verdict, server, "streams, a byte a second", readers, lambda: sip(server, stream, 1), ends)
    await part(verdict, server, "large answers, nothing read", readers, lambda: sip(server, large, 0), ends)
    await part(verdict, server, "large answers, a byte a second", readers, lambda: sip(server, large, 1), ends)
    # More than the kernel takes, so that the server itself has to give up. The answers are made one after the other.
    few = max(clients // 10, 1)
    patience = few * CUT_SECONDS
    await part(verdict, server, "answers beyond the kernel's buffers", few, lambda: sip(server, larger, 0, patience),
               {"cut"}, BEYOND_THE_KERNEL_MB)  # fmt: skip
    await table(verdict, server)
    return verdict.close(server)


def main() -> int:
    """Parse, serve, be slow."""
    given = options(__doc__, clients=50)
    with served(*FLAGS) as server:
        return asyncio.run(run(server, given.clients))


if __name__ == "__main__":
    sys.exit(main())

"""`python -m tests.faults.slow`: clients that take their time.

Slow senders dribble headers and bodies; slow readers ask for long streams and large answers and read a byte a second,
or nothing. The server's limits are set to a few seconds here. Each of them must be cut off or served, what they held
must be freed, memory must stay bounded meanwhile, and a client that behaves must not notice.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

from tests.faults import hostile
from tests.faults.harness import Server, Verdict, main, watched
from tests.faults.load import CHAT, bystander, chat

LIMIT_SECONDS = 5.0
# Twice a look apart, plus the grace that lets the application answer, plus a busy machine.
CUT_SECONDS = 4 * LIMIT_SECONDS
LAST_SECONDS = 60.0  # for an answer that is still being made


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


async def run(server: Server, clients: int) -> int:
    """Slow senders, slow readers."""
    verdict = Verdict("slow")

    async def part(
        name: str,
        number: int,
        one: Callable[[], Awaitable[tuple[float, Any]]],
        ends: set[Any],
        memory_mb: float = 100.0,
    ) -> None:
        """So many clients of a kind at once, whose ends must be of these, beside one that behaves. Unread answers may
        take `memory_mb` in all."""
        async with watched(server, 0.2) as samples:
            async with bystander(server, verdict, name):
                outcomes = await asyncio.gather(*(one() for _ in range(number)))
            idle = await server.seconds_until_idle()
        seen = {end for _, end in outcomes}
        slowest = max(seconds for seconds, _ in outcomes)
        grown = max(sample.front_mb for sample in samples) - samples[0].front_mb
        before, after = samples[0].front_fds, samples[-1].front_fds
        verdict.promise(f"{name}: all cut or served", slowest < math.inf and seen <= ends, f"{seen} in {slowest:.1f} s")
        verdict.promise(f"{name}: memory bounded", grown <= memory_mb, f"{grown:+.1f} MB at most")
        kept = after <= before and idle <= 10
        verdict.promise(f"{name}: descriptors and slots back", kept, f"{before} -> {after}, idle after {idle:.1f} s")

    body = json.dumps(chat(1)).encode()
    head = hostile.post(b"", f"Content-Length: {len(body)}", path=CHAT, length=False)
    too_big = hostile.post(b"", "Content-Length: 99999999", length=False)
    length = {"max_tokens": 256, "diffusion": {"steps": 64}, "ignore_eos": True}
    stream = hostile.post(json.dumps(chat(2, stream=True, stream_canvas=True, **length)).encode(), path=CHAT)
    large, larger = (
        hostile.post(json.dumps({"prompt": "word " * words, "return_token_strs": True}).encode(), path="/tokenize")
        for words in (50_000, 250_000)
    )
    await part("headers byte by byte", clients, lambda: dribble(server, head[:20]), {408})
    await part("nothing sent", clients, lambda: dribble(server, b"", pause=60), {0})
    await part("bodies byte by byte", clients, lambda: dribble(server, head + body[:5]), {0, 408})
    await part("bodies that go on after 413", clients, lambda: dribble(server, too_big), {413})
    readers = max(clients // 5, 1)
    ends = {"cut", "ended"}
    await part("streams, nothing read", readers, lambda: sip(server, stream, 0), ends)
    await part("streams, a byte a second", readers, lambda: sip(server, stream, 1), ends)
    await part("large answers, nothing read", readers, lambda: sip(server, large, 0), ends)
    await part("large answers, a byte a second", readers, lambda: sip(server, large, 1), ends)
    # More than the kernel takes, so that the server itself has to give up. The answers are made one after the other.
    few = max(clients // 10, 1)
    patience = few * CUT_SECONDS
    await part("answers beyond the kernel's buffers", few, lambda: sip(server, larger, 0, patience), {"cut"}, 200.0)
    return verdict.close(server)


if __name__ == "__main__":
    flags = ("--slow-client-seconds", str(LIMIT_SECONDS), "--idle-connection-seconds", "5")
    main(__doc__, run, *flags, clients=50)

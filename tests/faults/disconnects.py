"""`python -m tests.faults.disconnects --clients 1000`: clients that go at any moment, two hundred at a time.

They leave in the middle of the header or of the body, while they are queued, while their answer is made, or after some
bytes of a stream; by closing, by closing only their sending half, or by a reset. What they had asked for must leave
with them: no slot, no descriptor, no memory may stay behind, and clients that stayed must get their right answers all
the while.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import struct
from collections import Counter

from tqdm import tqdm

from tests.faults import hostile
from tests.faults.harness import GROWTH_PERCENT, Server, Verdict, main, watched
from tests.faults.load import CHAT, bystander, chat

MOMENTS = ("connected", "in the header", "in the body", "at once", "while waiting", "in the stream", "pipelining")
WAYS = ("close", "half-close", "reset")
LEAST_MB = 3.0  # a small process may grow by this much


async def leave(writer: asyncio.StreamWriter, reader: asyncio.StreamReader, way: str) -> None:
    """Go in one of the ways."""
    sock: socket.socket = writer.get_extra_info("socket")
    if way == "reset":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    if way == "half-close" and writer.can_write_eof():
        writer.write_eof()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(5):
                while await reader.read(65_536):
                    pass
    writer.transport.abort() if way == "reset" else writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def client_that_leaves(server: Server, generator: random.Random) -> str:
    """One client; returns when it left and how."""
    moment, way = generator.choice(MOMENTS), generator.choice(WAYS)
    guided = generator.random() < 0.5
    body = chat(generator.randrange(2**31), max_tokens=64, diffusion={"steps": 64}, ignore_eos=True)
    if guided:
        body |= {"guidance": generator.choice(("entrgi", "aps")), "best_of": 2}
    if moment == "in the stream" or generator.random() < 0.3:
        body |= {"stream": True, "stream_canvas": generator.random() < 0.5}
    request = hostile.post(json.dumps(body).encode(), path=CHAT)
    size = request.index(b"\r\n\r\n") + 4  # of the header
    reader, writer = await asyncio.open_connection(server.host, server.port)
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        if moment == "in the header":
            writer.write(request[: generator.randrange(1, size)])
        elif moment == "in the body":
            writer.write(request[: generator.randrange(size, len(request))])
        elif moment != "connected":
            writer.write(request)
        if moment == "pipelining":  # the beginning of another request hides the end from a server that reads no further
            writer.write(request[: generator.randrange(1, size)])
        await writer.drain()
        if moment == "in the stream":
            async with asyncio.timeout(30):
                await reader.readexactly(generator.randrange(1, 3000))
        elif moment in ("while waiting", "pipelining", "in the body", "in the header"):
            await asyncio.sleep(generator.uniform(0.0, 2.0))
    await leave(writer, reader, way)
    return f"{moment}, {way}"


async def wave(server: Server, clients: int, at_once: int, seed: int) -> Counter[str]:
    """So many clients, so many at a time."""
    left: Counter[str] = Counter()
    numbers = iter(tqdm(range(clients), desc="disconnects", mininterval=2))

    async def one_after_the_other() -> None:
        for number in numbers:
            try:
                left[await client_that_leaves(server, random.Random(seed + number))] += 1
            except TimeoutError:
                left["saw nothing for 30 s"] += 1

    await asyncio.gather(*(one_after_the_other() for _ in range(at_once)))
    return left


async def run(server: Server, clients: int, at_once: int, seed: int) -> int:
    """A first wave, which fills what is filled once, then the wave that counts."""
    verdict = Verdict("disconnects")
    await wave(server, at_once, at_once, seed + clients)
    await asyncio.sleep(8)  # until they are gone for certain
    async with watched(server, 5.0) as samples:
        async with bystander(server, verdict, "disconnects"):
            left = await wave(server, clients, at_once, seed)
        idle = await server.seconds_until_idle()
    verdict.figures["left"] = dict(sorted(left.items()))
    verdict.promise("all clients left as they meant to", "saw nothing for 30 s" not in left, left.total())
    before, after = samples[0], samples[-1]
    for name in ("front_mb", "worker_mb"):
        grown = getattr(after, name) - getattr(before, name)
        allowed = max(LEAST_MB, GROWTH_PERCENT / 100 * getattr(before, name))
        verdict.promise(f"{name} grew by at most {allowed:.1f}", grown <= allowed, f"{grown:+.1f}")
    for name in ("front_fds", "front_threads"):
        seen = f"{getattr(before, name)} -> {getattr(after, name)}"
        verdict.promise(f"{name} are back", getattr(after, name) <= getattr(before, name), seen)
    return verdict.close(server, idle)


if __name__ == "__main__":
    main(__doc__, run, clients=1000, at_once=200, seed=0)

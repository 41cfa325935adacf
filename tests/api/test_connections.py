"""How many connections a server takes, on real sockets: who comes too many is told so, and probes still get in."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
import pytest

from server.api.protocol import EXTRA_CONNECTIONS
from tests.api.scripted_engine import ScriptedEngine, check_envelope, never, serving
from tests.faults import hostile

LIMIT = 4
BODY: dict[str, Any] = {"prompt": "Hi"}
GOOD = hostile.post(json.dumps(BODY).encode(), path="/v1/completions")


@asynccontextmanager
async def idle(port: int, count: int) -> AsyncIterator[list[asyncio.StreamReader]]:
    """Connections that send nothing, accepted by the server in this order."""
    opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(count)]
    yield [reader for reader, _ in opened]
    for _, writer in opened:
        writer.transport.abort()


def asking(port: int) -> httpx.AsyncClient:
    """A client whose every request is a connection of its own."""
    limits = httpx.Limits(max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", limits=limits, timeout=30)


async def until_served(client: httpx.AsyncClient) -> None:
    """Connections that were closed are forgotten soon, not at once."""
    async with asyncio.timeout(30):
        while (await client.get("/version")).status_code != 200:
            pass


@pytest.mark.parametrize("root_path", ["", "/llm"])
async def test_past_the_limit_only_probes_are_answered(root_path: str) -> None:
    async with serving(max_connections=LIMIT, root_path=root_path) as port, asking(port) as client:
        async with idle(port, LIMIT):
            refused = await client.post("/v1/completions", json=BODY)
            assert check_envelope(refused, 503)["code"] == "too_many_connections"
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.headers["connection"] == "close"
            assert refused.headers["x-request-id"]
            for path in ("/health", "/ready", "/ping", "/metrics"):
                for prefix in {"", root_path}:
                    assert (await client.get(prefix + path)).status_code == 200
                    assert (await client.head(prefix + path)).status_code == 200
            for path in ("/", "/v1/models", "/nowhere", "/health/", "/openapi.json"):
                check_envelope(await client.get(path), 503)
            counted = 'admission_rejections_total{reason="too_many_connections"} 6.0'
            assert counted in (await client.get("/metrics")).text
        await until_served(client)
        assert (await client.post(f"{root_path}/v1/completions", json=BODY)).status_code == 200


async def test_those_within_the_limit_are_served_meanwhile() -> None:
    async with (
        serving(max_connections=LIMIT) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as regular,
        asking(port) as client,
    ):
        assert (await regular.post("/v1/completions", json=BODY)).status_code == 200
        async with idle(port, LIMIT - 1):
            for _ in range(3):
                check_envelope(await client.post("/v1/completions", json=BODY), 503)
                assert (await regular.post("/v1/completions", json=BODY)).status_code == 200


async def test_running_requests_count_whatever_they_wait_for() -> None:
    async with serving(ScriptedEngine(never), max_connections=LIMIT) as port, asking(port) as client:
        running = [await asyncio.open_connection("127.0.0.1", port) for _ in range(LIMIT)]
        for _, writer in running:
            writer.write(GOOD)
        for _ in range(3):
            check_envelope(await client.post("/v1/completions", json=BODY), 503)
        assert not any(reader.at_eof() for reader, _ in running)
        for _, writer in running:
            writer.transport.abort()
        await until_served(client)


async def test_one_answer_a_connection_past_the_limit(caplog: pytest.LogCaptureFixture) -> None:
    """A probe's connection, too, is closed with its answer: kept alive, they would use up the few there are. A large
    request gets its answer and not a reset, although nobody reads its body. However many are refused in a row, probes
    still get in."""
    head = hostile.get(path="/v1/models").replace(b"GET", b"HEAD")
    large = hostile.post(b"{" + b" " * 1_900_000 + b"}", path="/v1/completions")
    async with serving(max_connections=LIMIT) as port, asking(port) as client, idle(port, LIMIT):
        for request, status in (
            (hostile.get(path="/health"), 200), (GOOD, 503), (GOOD * 2, 503), (head, 503), (large, 503),
        ):  # fmt: skip
            reply = await hostile.exchange(port, request, seconds=30, linger=30)
            assert (reply.status, reply.closed) == (status, True)
            assert bool(reply.body) == (request is not head)
        for _ in range(3 * EXTRA_CONNECTIONS):
            check_envelope(await client.post("/v1/completions", json=BODY), 503)
        assert (await client.get("/ready")).status_code == 200
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_far_past_the_limit_connections_are_cut_off() -> None:
    async with serving(max_connections=LIMIT) as port, asking(port) as client:
        async with idle(port, LIMIT + EXTRA_CONNECTIONS), idle(port, 3) as too_many:
            for reader in too_many:
                with suppress(ConnectionError):
                    async with asyncio.timeout(30):
                        assert await reader.read() == b""
        await until_served(client)


async def test_who_says_nothing_past_the_limit_soon_makes_room_for_probes() -> None:
    """Within seconds, whatever time `slow_client_seconds` gives to others."""
    patient = serving(max_connections=LIMIT, slow_client_seconds=3000)
    async with patient as port, asking(port) as client, idle(port, LIMIT + EXTRA_CONNECTIONS):
        async with asyncio.timeout(60):
            while True:
                with suppress(httpx.TransportError):
                    assert (await client.get("/health")).status_code == 200
                    return


async def test_an_offer_of_http_2_is_left_alone_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    """JDK's client makes one with every request. After it the server still sees the client leave."""
    offer = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAAB")
    engine = ScriptedEngine(never)
    async with serving(engine) as port, asyncio.timeout(60):
        assert (await hostile.exchange(port, hostile.get(*offer))).status == 200
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(hostile.post(json.dumps({**BODY, "stream": True}).encode(), *offer) + b"GET /version")
        await reader.readuntil(b"200 OK")
        writer.close()
        while not engine.cancelled:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_idle_connections_live_as_long_as_a_setting_says() -> None:
    async with serving(idle_connection_seconds=1) as port, asyncio.timeout(60):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(hostile.get())
        assert b"200 OK" in await reader.read()  # to the end, which the server makes
        writer.close()


def test_descriptors_are_allowed_for() -> None:
    """In a process of its own: a limit cannot be lowered for a test and raised again."""
    program = """
import resource
from server.cli import allow_descriptors
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 512))
for needed in (32, 200, 1000):
    allow_descriptors(needed)
    print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split("\n")[:3] == ["64 512", "200 512", "512 512"]
    (warning,) = done.stderr.splitlines()  # enough of them are left alone in silence
    assert "max_connections needs 1000 descriptors and the system allows 512" in warning

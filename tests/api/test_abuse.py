"""Clients that misbehave, in short: hostile bytes, fuzzed requests, slow clients, ones that leave. The long forms
are the programs of tests/faults."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults import hostile
from tests.faults.mutations import BODIES, mutant
from tests.support.serving import GOLDEN, wait_for

if TYPE_CHECKING:
    from tests.support.serving import Launch, Served

RM = GOLDEN / "dream-tiny" / "rm"
CHAT = "/v1/chat/completions"
KNOWN: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "seed": 3}
LONG: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Tell me"}], "max_tokens": 400, "best_of": 4,
    "guidance": {"method": "entrgi", "gradient_steps": 16},
}  # fmt: skip


@pytest.fixture(scope="module")
def abused(launch: Launch) -> Served:
    """A server with limits of a second."""
    rewards = (flag for name in ("sentiment", "concrete") for flag in ("--reward-model", f"{name}={RM}"))
    short = ("--slow-client-seconds", "1", "--idle-connection-seconds", "5", "--request-timeout", "200")
    served = launch(*rewards, *short, "--batch-trajectories", "16")
    served.wait_ready()
    return served


@pytest.fixture(scope="module")
def known(abused: Served) -> Any:
    """The known request's answer, before anybody has misbehaved."""
    return abused.post(CHAT, KNOWN).json()["choices"]


@pytest.fixture
def unharmed(abused: Served, known: Any) -> Any:
    """The known request gets the same answer afterwards, no slot is left taken, and nothing went wrong."""
    yield abused
    wait_for(lambda: abused.metric("num_requests_running") + abused.metric("num_requests_waiting") == 0)
    assert abused.post(CHAT, KNOWN).json()["choices"] == known
    assert '"level": "ERROR"' not in abused.log.read_text()


def descriptors(served: Served) -> int:
    return len(os.listdir(f"/proc/{served.process.pid}/fd"))


@pytest.mark.parametrize("case", list(hostile.requests()), ids=lambda case: case.name)
async def test_hostile_bytes(abused: Served, known: Any, case: hostile.Hostile) -> None:
    reply = await hostile.exchange(abused.port, case.data, seconds=60, linger=30.0 if case.closes else 0.0)
    assert reply.status in case.statuses
    assert reply.closed or not case.closes
    assert hostile.fault(reply) is None
    assert abused.post(CHAT, KNOWN).json()["choices"] == known


def test_the_fuzzer_starts_from_requests_that_are_valid(unharmed: Served) -> None:
    for path, body in BODIES:
        assert unharmed.post(path, body).status_code == 200, (path, body)


async def test_fuzzed_requests(unharmed: Served) -> None:
    assert mutant(1, 0) == mutant(1, 0) != mutant(2, 0)  # the same each time
    statuses = set()
    for start in range(0, 160, 16):
        cases = [mutant(99, index) for index in range(start, start + 16)]
        exchanges = [hostile.exchange(unharmed.port, case, seconds=100) for case in cases]
        for case, reply in zip(cases, await asyncio.gather(*exchanges), strict=True):
            statuses.add(reply.status)
            assert hostile.fault(reply, with_body=not case.startswith(b"HEAD ")) is None
    assert {200, 400, 405, 408} <= statuses


GOOD = hostile.post(json.dumps(KNOWN).encode(), path=CHAT)


@pytest.mark.parametrize(
    ("start", "status"),
    [
        (b"", 0),
        (b"GET /ver", 408),
        (b"GET /version HTTP/1.1\r\nHost: test\r\n", 408),
        (GOOD[:-10], 408),
        (hostile.post(b"", "Transfer-Encoding: chunked", length=False) + b"ffff\r\n{", 408),
        (hostile.post(b"", "Content-Length: 99999999", length=False), 413),
    ],
)
async def test_slow_senders_are_cut_off(unharmed: Served, start: bytes, status: int) -> None:
    """A byte every tenth of a second keeps nothing open."""
    reader, writer = await asyncio.open_connection(unharmed.host, unharmed.port)
    writer.write(start)

    async def dribble() -> None:
        with contextlib.suppress(OSError):
            while start:
                await asyncio.sleep(0.1)
                writer.write(b"x")
                await writer.drain()

    dribbling = asyncio.create_task(dribble())
    received = b""
    with contextlib.suppress(OSError):
        async with asyncio.timeout(60):
            while data := await reader.read(65_536):
                received += data
    dribbling.cancel()
    assert received.startswith(f"HTTP/1.1 {status}".encode() if status else b"")
    assert bool(received) == bool(status)
    writer.transport.abort()


@contextlib.contextmanager
def deaf(served: Served, data: bytes) -> Iterator[None]:
    """A client that sends this and reads nothing."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.settimeout(60)
        sock.connect((served.host, served.port))
        sock.sendall(data)
        yield


def test_who_reads_nothing_of_a_large_answer_is_cut_off(unharmed: Served) -> None:
    wait_for(lambda: descriptors(unharmed) < 40)
    before = descriptors(unharmed)
    body = json.dumps({"prompt": "word " * 300_000, "return_token_strs": True}).encode()
    with deaf(unharmed, hostile.post(body, path="/tokenize")):
        wait_for(lambda: descriptors(unharmed) > before)
        wait_for(lambda: descriptors(unharmed) <= before)


def test_who_reads_nothing_of_a_stream_holds_no_slot(unharmed: Served) -> None:
    """Whether the kernel takes it all or the server gives it up: `unharmed` sees the slot free again."""
    body = json.dumps({**KNOWN, "max_tokens": 128, "ignore_eos": True, "stream": True, "stream_canvas": True}).encode()
    with deaf(unharmed, hostile.post(body, path=CHAT)):
        wait_for(lambda: unharmed.metric("num_requests_running") == 1)
        wait_for(lambda: unharmed.metric("num_requests_running") == 0)


@pytest.mark.parametrize(("stream", "ahead"), [(False, 0), (True, 0), (False, 1), (False, 60_000)])
def test_leaving_frees_the_slot(unharmed: Served, stream: bool, ahead: int) -> None:
    """Also with half a request sent ahead: a server that stops reading while it answers would not see it."""
    aborted = unharmed.metric("request_success_total", finished_reason="abort")
    with socket.create_connection((unharmed.host, unharmed.port), timeout=60) as sock:
        sock.sendall(hostile.post(json.dumps({**LONG, "stream": stream}).encode(), path=CHAT))
        sock.sendall((b"GET /version HTTP/1.1\r\nHost: test\r\nA: " + b"x" * 60_000)[:ahead])
        wait_for(lambda: unharmed.metric("num_requests_running") == 1)
    wait_for(lambda: unharmed.metric("request_success_total", finished_reason="abort") == aborted + 1)


def test_sending_far_ahead_ends_the_connection(unharmed: Served) -> None:
    with socket.create_connection((unharmed.host, unharmed.port), timeout=60) as sock:
        sock.sendall(hostile.post(json.dumps(LONG).encode(), path=CHAT))
        with contextlib.suppress(OSError):
            sock.sendall(b"GET /version HTTP/1.1\r\nHost: test\r\n\r\n" * 10_000)
        with contextlib.suppress(ConnectionError):
            assert sock.recv(1) == b""


def test_pipelined_requests_are_answered_in_order(unharmed: Served) -> None:
    with socket.create_connection((unharmed.host, unharmed.port), timeout=60) as sock:
        names = [f"number-{index}" for index in range(20)]
        sock.sendall(b"".join(hostile.get(f"X-Request-Id: {name}") for name in names))
        received = b""
        while received.count(b"HTTP/1.1 200") < 20 or not received.endswith(b"}"):
            received += sock.recv(65_536)
    assert re.findall(rb"x-request-id: (\S+)", received) == [name.encode() for name in names]


async def test_clients_that_leave(unharmed: Served) -> None:
    async def leave(number: int) -> None:
        generator = random.Random(number)
        data = GOOD if number % 2 else hostile.post(json.dumps({**LONG, "stream": True}).encode(), path=CHAT)
        _, writer = await asyncio.open_connection(unharmed.host, unharmed.port)
        writer.write(data[: generator.randrange(len(data))] if number % 3 else data)
        await asyncio.sleep(generator.uniform(0, 0.5))
        writer.transport.abort() if number % 5 else writer.close()

    await asyncio.gather(*map(leave, range(60)))
    wait_for(lambda: descriptors(unharmed) < 40)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9/", "file:///etc/passwd", "http://169.254.169.254/latest/meta-data/"]
)
def test_no_request_makes_the_server_fetch(abused: Served, url: str) -> None:
    part = {"type": "image_url", "image_url": {"url": url}}
    chat = {**KNOWN, "messages": [{"role": "user", "content": [part]}]}
    assert abused.post(CHAT, chat).status_code == 400
    for field in ("model", "guidance"):
        value = url if field == "model" else {"method": "entrgi", "reward_model": url}
        assert abused.post(CHAT, {**KNOWN, field: value}).status_code in (400, 404)
    assert abused.post("/v1/score", {"model": url, "queries": "a", "documents": "b"}).status_code == 404


def test_metrics_do_not_grow_with_what_clients_name(unharmed: Served) -> None:
    def series() -> set[str]:
        text = unharmed.client.get("/metrics").text
        return {line.partition(" ")[0] for line in text.splitlines() if not line.startswith("#")}

    def mischief(number: int) -> None:
        unharmed.client.get(f"/nowhere/{number}", headers={"User-Agent": f"agent {number}"})
        unharmed.client.get(f"/v1/models/{number}")
        unharmed.post(CHAT, {**KNOWN, "model": f"model-{number}"})
        unharmed.post(CHAT, {**KNOWN, "user": f"user-{number}", "max_tokens": 2})
        names = ["sentiment", "concrete"][:: 1 if number % 2 else -1]
        weighted = {"method": "bon", "reward_models": [{"model": name, "weight": number / 9} for name in names]}
        unharmed.post(CHAT, {**KNOWN, "max_tokens": 2, "best_of": 1, "guidance": weighted})

    mischief(1)
    series()  # a scrape is a request, too
    before = series()
    for number in range(2, 12):
        mischief(number)
    assert series() == before

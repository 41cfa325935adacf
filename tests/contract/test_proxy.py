"""The proxy of docker-compose.yml, a real HAProxy with our configuration, before two servers."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.scripted_engine import check_envelope
from tests.faults import hostile
from tests.support.serving import ROOT, Launch, Served, chunks_of, free_port, wait_answer, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("haproxy") is None, reason="HAProxy is not installed"),
]
TEXTS = "/v1/completions"
SHORT = {"prompt": "a b c", "max_tokens": 4, "seed": 1}
LONG = {"prompt": "a b c", "max_tokens": 512, "n": 2, "ignore_eos": True, "diffusion": {"steps": 512}}


@dataclass
class Site:
    """Two servers, and a client of the proxy before them."""

    servers: list[Served]
    client: httpx.Client

    @contextmanager
    def stream(self, body: dict[str, Any]) -> Iterator[Iterator[str]]:
        """The lines of a stream that has begun: its first piece is here."""
        with self.client.stream("POST", TEXTS, json={**body, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            lines = response.iter_lines()
            next(lines)
            yield lines

    def running(self) -> list[float]:
        """Prompts that each server computes."""
        return [server.metric("num_requests_running") for server in self.servers]


@pytest.fixture
def site(launch: Launch, tmp_path: Path) -> Iterator[Site]:
    """Its configuration is the file's, but for the addresses: Docker's names are not here."""
    servers = [launch("--drain-seconds", "120") for _ in range(2)]
    for server in servers:
        server.wait_ready()
    port = free_port()
    text = (ROOT / "deploy/haproxy.cfg").read_text("utf-8").replace("bind :8000", f"bind 127.0.0.1:{port}")
    named = "\n".join(f"  server server-{i} 127.0.0.1:{server.port}" for i, server in enumerate(servers))
    text = re.sub(r"\n  server-template .*", "\n" + named, text).replace("resolvers docker init-addr none", "")
    configuration, log = tmp_path / "haproxy.cfg", tmp_path / "log"
    configuration.write_text(text, "utf-8")
    with log.open("wb") as output:
        process = subprocess.Popen(["haproxy", "-f", str(configuration)], stdout=output, stderr=output)
    try:
        wait_answer(f"http://127.0.0.1:{port}/ready", process, log)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            yield Site(servers, client)
    finally:
        process.kill()
        process.wait()


def test_streams_are_passed_on_at_once_to_the_idlest_and_who_leaves_is_gone(site: Site) -> None:
    with ExitStack() as streams:
        for _ in site.servers:
            streams.enter_context(site.stream(LONG))
        wait_for(lambda: site.running() == [1, 1])
    wait_for(lambda: site.running() == [0, 0])
    assert [server.metric("request_success_total", finished_reason="abort") for server in site.servers] == [1, 1]
    address = (site.client.base_url.host, site.client.base_url.port)
    with socket.create_connection(address) as waiting:  # for a whole answer
        waiting.sendall(hostile.post(json.dumps(LONG).encode()))
        wait_for(lambda: 1 in site.running())
    wait_for(lambda: site.running() == [0, 0])
    streamed = site.client.post(TEXTS, json={**SHORT, "stream": True}).text
    whole = site.client.post(TEXTS, json=SHORT).json()["choices"][0]["text"]
    assert "".join(choice["text"] for chunk in chunks_of(streamed) for choice in chunk["choices"]) == whole


def test_a_server_that_drains_or_dies_costs_nobody_else_an_answer(site: Site) -> None:
    with site.stream(LONG):
        wait_for(lambda: 1 in site.running())
        dying = site.servers[site.running().index(1)]
        with ThreadPoolExecutor() as pool:
            lost = pool.submit(site.client.post, TEXTS, json=LONG)
            wait_for(lambda: site.running() == [1, 1])
            other = next(server for server in site.servers if server is not dying)
            other.process.kill()  # what had been sent to it is not sent again
            assert check_envelope(lost.result(), 502)["code"] == "server_lost"
        for _ in range(4):  # no request meets the dead one, also before it is known to be dead
            assert site.client.post(TEXTS, json=SHORT).status_code == 200
    assert dying.stop() == 0
    wait_for(lambda: site.client.get("/ready").status_code == 503)
    refused = site.client.post(TEXTS, json=SHORT)
    assert check_envelope(refused, 503)["code"] == "not_ready"
    assert refused.headers["retry-after"] == "5"


def test_a_server_that_drains_finishes_what_it_has_and_gets_nothing_new(site: Site) -> None:
    with site.stream({**LONG, "n": 1}) as rest, site.stream(LONG):
        wait_for(lambda: site.running() == [1, 1])
        draining = site.servers[0]
        draining.process.terminate()
        # Of two servers with as much to do, each would get every other request.
        wait_for(lambda: all(site.client.post(TEXTS, json=SHORT).status_code == 200 for _ in range(4)))
        assert draining.process.poll() is None
        assert "data: [DONE]" in list(rest)
    assert site.client.post(TEXTS, json=SHORT).status_code == 200


def test_headers_pass_up_to_the_servers_own_limit(site: Site) -> None:
    sent = httpx.Headers({"a": "x" * 60_000} | {f"field-{i}": "b" for i in range(200)})
    assert site.client.get("/version", headers=sent).status_code == 200

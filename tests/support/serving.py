"""A server started as a user would start it: the one way for tests, fault programs and conformance checks.

Needs only what serving needs (no pytest), because the conformance checks and the dashboards run without the
development tools.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
START_SECONDS = 300.0
STOP_SECONDS = 60.0

QUICK = ("--threads", "1", "--no-spare-worker")
"""Flags of a server whose worker nobody kills: the spare worker's imports would slow every start."""


def golden_flags(*pairs: str) -> list[str]:
    """Flags for the diffusion model of the first pair (`dream-tiny` by default) and every pair's reward model, in
    float32. The first reward model is called `rm`, the second `other`; a pair without one has that of `dream-tiny`.
    BD3LM's model is an A2D one that does not say that it is block-causal."""
    pairs = pairs or ("dream-tiny",)
    flags = ["--model", str(GOLDEN / pairs[0] / "dlm"), "--dtype", "float32"]
    for name, pair in zip(("rm", "other"), pairs, strict=False):
        folder = GOLDEN / pair / "rm"
        flags += ["--reward-model", f"{name}={folder if folder.is_dir() else GOLDEN / 'dream-tiny' / 'rm'}"]
    return [*flags, "--attention", "block_causal"] if pairs[0] == "bd3lm-tiny" else flags


def wait_answer(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float = START_SECONDS) -> None:
    """Until the process answers at the URL with 200. Raises RuntimeError, with the end of its log, when it ends before
    that, or does not get there in time."""
    give_up_at = time.monotonic() + seconds
    while time.monotonic() < give_up_at and process.poll() is None:
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass  # it does not listen yet
        time.sleep(0.1)
    told = log.read_text("utf-8", errors="replace")[-4000:]
    raise RuntimeError(f"no answer at {url}: exit status {process.poll()}\n{told}")


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Until the condition holds. Raises AssertionError when it does not in time."""
    give_up_at = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up_at, "waited in vain"
        time.sleep(0.02)


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@dataclass
class Served:
    """A server's process, and what is asked of it again and again."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    host = "127.0.0.1"

    @functools.cached_property
    def client(self) -> httpx.Client:
        """A client that waits longer than any test takes."""
        return httpx.Client(base_url=self.url, timeout=120)

    @property
    def port(self) -> int:
        """Where it listens, on the loopback."""
        return int(self.url.rpartition(":")[2])

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        """One JSON request."""
        return self.client.post(path, json=body)

    def stream(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """All chunks of a stream, which must end with [DONE]."""
        with self.client.stream("POST", path, json={**body, "stream": True}) as response:
            text = response.read().decode()
        assert response.status_code == 200, text
        assert response.headers["content-type"].startswith("text/event-stream")
        return chunks_of(text)

    def metric(self, name: str, **labels: str) -> float:
        """The first value in /metrics of this name (without `entrgi:`) and these labels; 0 when it is not there."""
        for family in text_string_to_metric_families(self.client.get("/metrics").text):
            for sample in family.samples:
                if sample.name == f"entrgi:{name}" and labels.items() <= sample.labels.items():
                    return sample.value
        return 0.0

    def wait_ready(self, seconds: float = START_SECONDS) -> None:
        """Until /ready is 200. Raises RuntimeError, with the end of the log, when the server does not get there."""
        wait_answer(self.url + "/ready", self.process, self.log, seconds)

    def stop(self) -> int:
        """SIGTERM; the exit status. Raises TimeoutExpired, after SIGKILL, when the server does not end by itself."""
        if "client" in self.__dict__:
            self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


Launch = Callable[..., Served]
"""What the fixture `launch` gives: flags, and perhaps `model`, to a server that was started."""


def start(*flags: str, log: Path, module: str = "server") -> Served:
    """Start a server on a free port of the loopback and do not wait for it. `ENTRGI_*` of the environment is not
    passed on; the process has a group of its own, so that an interrupt of the program leaves the stopping to it."""
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ENTRGI_")}
    environment.setdefault("OMP_NUM_THREADS", "1")
    command = [sys.executable, "-m", module, "--host", "127.0.0.1", "--port", str(port), *flags]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output, process_group=0)
    return Served(process, f"http://127.0.0.1:{port}", log)


@contextmanager
def served(*flags: str, log: Path | None = None, module: str = "server") -> Iterator[Served]:
    """A server with these flags, ready; stopped at the end. Raises RuntimeError when it does not get ready."""
    with tempfile.TemporaryDirectory() as folder:
        server = start(*flags, log=log or Path(folder) / "log", module=module)
        try:
            server.wait_ready()
            yield server
        finally:
            server.stop()


def events_of(text: str) -> list[str]:
    """The data of a stream's events, comments left out. Raises ValueError when the stream does not end with [DONE]."""
    events = [event.removeprefix("data: ") for event in text.split("\n\n") if event and not event.startswith(":")]
    if not events or events[-1] != "[DONE]":
        raise ValueError("the stream has no end")
    return events[:-1]


def chunks_of(text: str) -> list[dict[str, Any]]:
    """The chunks of a stream. Raises ValueError when the stream does not end with [DONE]."""
    return [json.loads(event) for event in events_of(text)]

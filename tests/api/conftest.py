"""A real server on the golden Dream checkpoint, once for all tests here; and applications in-process for what needs no
model: states that a healthy server is never in, limits, keys."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"


@dataclass
class Served:
    """A server process."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=self.url, timeout=120)

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        """One JSON request."""
        return self.client.post(path, json=body)

    def stream(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """All chunks of a stream, which must end with [DONE]."""
        with self.client.stream("POST", path, json={**body, "stream": True}) as response:
            text = response.read().decode()
        assert response.status_code == 200, text
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [event for event in text.split("\n\n") if event and not event.startswith(":")]
        assert events[-1] == "data: [DONE]"
        return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]

    def metric(self, name: str, **labels: str) -> float:
        """One value from /metrics; 0 when it is not there."""
        from prometheus_client.parser import text_string_to_metric_families

        for family in text_string_to_metric_families(self.client.get("/metrics").text):
            for sample in family.samples:
                if sample.name == f"entrgi:{name}" and labels.items() <= sample.labels.items():
                    return sample.value
        return 0.0

    def wait_ready(self, seconds: float = 180) -> None:
        """Until /ready is 200."""
        give_up_at = time.monotonic() + seconds
        while time.monotonic() < give_up_at:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended: {self.log.read_text()[-3000:]}")
            try:
                if self.client.get("/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise RuntimeError(f"not ready: {self.log.read_text()[-3000:]}")

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


Launch = Callable[..., Served]


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """Starts servers on the golden Dream checkpoint with two reward models; all are stopped at the end."""
    started: list[Served] = []

    def start(*flags: str, model: Path | None = GOLDEN / "dream-tiny" / "dlm") -> Served:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        log = tmp_path_factory.mktemp("server") / "log"
        command = [sys.executable, "-m", "server", "--port", str(port), "--dtype", "float32", "--threads", "1"]
        command.append("--no-spare-worker")  # nobody kills workers here, and its imports would slow every start
        if model is not None:
            command += ["--model", str(model)]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("ENTRGI_")}
        with log.open("wb") as output:
            process = subprocess.Popen([*command, *flags], cwd=ROOT, env=environment, stdout=output, stderr=output)
        started.append(Served(process, f"http://127.0.0.1:{port}", log))
        return started[-1]

    yield start
    for each in started:
        each.stop()


@pytest.fixture(scope="session")
def server(launch: Launch) -> Served:
    """The server that tests share."""
    rewards = (f"{name}={GOLDEN / folder / 'rm'}" for name, folder in (("rm", "dream-tiny"), ("other", "llada-tiny")))
    served = launch(*(flag for value in rewards for flag in ("--reward-model", value)))
    served.wait_ready()
    return served

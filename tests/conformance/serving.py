"""A server started as a user would start it, for the programs and tests that talk to it over HTTP."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
START_SECONDS = 240.0


@contextmanager
def served(*arguments: str, log: Path | None = None) -> Iterator[str]:
    """A server with these arguments on a free port of the loopback: its URL, once it is ready. Raises RuntimeError
    when it does not get there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "server", "--host", "127.0.0.1", "--port", str(port), *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ENTRGI_")}
    with (log or Path(os.devnull)).open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
        try:
            _wait(process, url, log)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen[bytes], url: str, log: Path | None) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url + "/ready", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    told = log.read_text("utf-8", errors="replace")[-4000:] if log else ""
    raise RuntimeError(f"the server is not ready: exit status {process.poll()}\n{told}")


def golden_arguments(name: str) -> list[str]:
    """The server's arguments for a golden pair."""
    folder = GOLDEN / name
    return ["--model", str(folder / "dlm"), "--reward-model", f"rm={folder / 'rm'}", "--dtype", "float32"]

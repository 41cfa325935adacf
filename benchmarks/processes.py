"""A server, and its engine without HTTP, as child processes of a benchmark. Nothing of the server is imported."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from clients.errors import ClientError

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 300.0
STOP_SECONDS = 30.0


@asynccontextmanager
async def served(arguments: Sequence[str]) -> AsyncIterator[str]:
    """Start `python -m server` with these arguments on a free port, wait until it is ready, yield its URL, stop it."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with tempfile.TemporaryFile() as log:
        process = await _start(["-m", "server", "--port", str(port), *arguments], stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            if not await _ready(process, url):
                log.seek(0)
                raise ClientError(f"the server did not start:\n{log.read()[-2000:].decode(errors='replace')}")
            yield url
        finally:
            await _stop(process)


async def _ready(process: asyncio.subprocess.Process, url: str) -> bool:
    deadline = asyncio.get_running_loop().time() + START_SECONDS
    async with httpx.AsyncClient(base_url=url) as http:
        while process.returncode is None and asyncio.get_running_loop().time() < deadline:
            try:
                if (await http.get("/ready")).status_code == 200:
                    return True
            except httpx.TransportError:
                pass  # it does not listen yet
            await asyncio.sleep(0.2)
    return False


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        await asyncio.wait_for(process.wait(), STOP_SECONDS)
    except TimeoutError:
        process.kill()
        await process.wait()


class Engine:
    """The engine in a process of its own (`benchmarks.inprocess`); `about` is what it said when it was ready."""

    def __init__(self, process: asyncio.subprocess.Process, about: dict[str, Any]) -> None:
        self._process = process
        self.about = about

    async def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Send it one line and read its answer, one line too."""
        if self._process.stdin is None:
            raise ClientError("the engine's process has no input")
        self._process.stdin.write(json.dumps(question).encode() + b"\n")
        await self._process.stdin.drain()
        return await _line(self._process)


@asynccontextmanager
async def engine(arguments: Sequence[str]) -> AsyncIterator[Engine]:
    """Start the engine's process, wait until it is ready, and end it by closing its input."""
    process = await _start(
        ["-m", "benchmarks.inprocess", *arguments],
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        yield Engine(process, await _line(process))
    finally:
        if process.stdin is not None:
            process.stdin.close()
        await _stop(process)


async def _line(process: asyncio.subprocess.Process) -> dict[str, Any]:
    if process.stdout is None:
        raise ClientError("the engine's process has no output")
    line = await process.stdout.readline()
    if not line:
        raise ClientError(f"the engine's process ended with status {await process.wait()}")
    value = json.loads(line)
    if not isinstance(value, dict):
        raise ClientError("the engine's process answered with something else than an object")
    return value


async def _start(arguments: Sequence[str], **pipes: Any) -> asyncio.subprocess.Process:
    # An answer is one line, which may be long.
    return await asyncio.create_subprocess_exec(
        sys.executable, *arguments, cwd=ROOT, env=dict(os.environ), limit=1 << 26, **pipes
    )


async def metrics(url: str, api_key: str | None = None) -> dict[str, float]:
    """The server's metrics without labels, by name."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    async with httpx.AsyncClient(base_url=url, headers=headers) as http:
        response = await http.get("/metrics")
        response.raise_for_status()
    return read_metrics(response.text)


def read_metrics(text: str) -> dict[str, float]:
    """Prometheus's text format: the samples without labels, by name."""
    return {name: float(value) for name, value in re.findall(r"^([A-Za-z_:][\w:]*) (\S+)$", text, re.MULTILINE)}

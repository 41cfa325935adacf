"""What the checks of all clients share. Runs in each client's own environment, so it needs the standard library only.

A check is a function; its docstring's first line is what the matrix calls it, with what it returns, if anything, in
brackets. Every check runs, whatever the others did, and is told as one JSON line:
`{"check": str, "passed": bool, "seconds": float, "error": str | null}`.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import inspect
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

URL = os.environ.get("CONFORMANCE_URL", "")  # of the server, without `/v1`
KEY = os.environ.get("CONFORMANCE_KEY", "")  # a valid one
MODEL = os.environ.get("CONFORMANCE_MODEL", "")  # the id of the diffusion model
REWARD = os.environ.get("CONFORMANCE_REWARD", "")  # the id of a reward model
OUT = Path(os.environ.get("CONFORMANCE_OUT", "."))  # a folder for the client's own files

PROMPT = "Write a short review of a film."
MESSAGES = [{"role": "user", "content": PROMPT}]

_CHECKS: list[Callable[[], Any]] = []


def check(function: Callable[[], Any]) -> Callable[[], Any]:
    """Register a check, plain or async."""
    _CHECKS.append(function)
    return function


def main(distribution: str | None = None) -> None:
    """Run all checks of the client that `distribution` installs, and exit: 0 when all passed, else 1."""
    say({"version": importlib.metadata.version(distribution) if distribution else "-", "checks": len(_CHECKS)})
    failed = False
    for function in _CHECKS:
        started, error, detail = time.monotonic(), None, None
        try:
            detail = function()
            if inspect.iscoroutine(detail):
                detail = asyncio.run(detail)
        except Exception as raised:
            traceback.print_exc()
            error = f"{type(raised).__name__}: {raised}"[:500]
        failed |= error is not None
        name = (inspect.getdoc(function) or function.__name__).partition("\n")[0].rstrip(".")
        name += f" ({detail})" if detail else ""
        say({"check": name, "passed": error is None, "seconds": time.monotonic() - started, "error": error})
    raise SystemExit(int(failed))


def say(data: dict[str, Any]) -> None:
    """One line for the runner."""
    print(json.dumps(data), flush=True)


def equal(left: object, right: object) -> None:
    """Raise unless both are equal, and show them."""
    if left != right:
        raise AssertionError(f"{left!r} is not {right!r}")


def true(condition: object, what: object = "") -> None:
    """Raise unless the condition holds, and show `what`."""
    if not condition:
        raise AssertionError(repr(what))


def raises(kind: type[Exception], function: Callable[[], Any]) -> Any:
    """The exception of this kind that the call must raise."""
    try:
        function()
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} was not raised")


def run(
    *command: str | Path, folder: Path = OUT, seconds: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a program of this client's environment in `folder`; its output goes to standard error too. The exit status
    is the caller's to judge. Raises TimeoutExpired."""
    name, *arguments = (str(part) for part in command)
    done = subprocess.run(
        [str(Path(sys.executable).parent / name), *arguments],
        env={**os.environ, **environment},
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=seconds,
    )
    print(done.stdout, file=sys.stderr, flush=True)
    return done

"""The conformance checks of the clients that our own environment has, in its versions of them; Schemathesis shortly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conformance.__main__ import SMALL, facts
from tests.support.serving import ROOT, Launch

CONFORMANCE = ROOT / "tests" / "conformance"
KEY = "the-key-of-this-test"


@pytest.mark.parametrize(
    ("client", "flags"),
    [("openai", ("--batch-dir", "{out}")), pytest.param("schemathesis", SMALL, marks=pytest.mark.slow)],
)
def test_a_client_finds_nothing_wrong(client: str, flags: tuple[str, ...], launch: Launch, tmp_path: Path) -> None:
    given = [flag.format(out=tmp_path) for flag in flags]
    served = launch("--api-key", KEY, *given, model=None)  # the bundled models, as conformance has them
    served.wait_ready()
    told = {"PYTHONPATH": str(CONFORMANCE / "shared"), "CONFORMANCE_OUT": str(tmp_path), "CONFORMANCE_SHORT": "1"}
    done = subprocess.run(
        [sys.executable, str(CONFORMANCE / client / "check.py")],
        env={**os.environ, **facts(served.url, KEY), **told},
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout
    assert '"passed": true' in done.stdout

"""Schemathesis over the whole OpenAPI document, shortly and from a fixed seed; `make conformance` does it at length."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.serving import Launch

ROOT = Path(__file__).resolve().parents[2]
KNOWLEDGE = ROOT / "tests" / "conformance" / "schemathesis"
REWARD = ROOT / "tests" / "golden" / "dream-tiny" / "rm"
KEY = "the-key-of-this-test"
LIMITS = ("--max-model-len", "96", "--max-trajectories", "4", "--max-score-pairs", "8")


@pytest.mark.slow
def test_schemathesis_finds_nothing(launch: Launch, tmp_path: Path) -> None:
    served = launch("--api-key", KEY, "--reward-model", f"rm={REWARD}", *LIMITS)
    served.client.headers["Authorization"] = f"Bearer {KEY}"
    served.wait_ready()
    command = [str(Path(sys.executable).with_name("st")), "--config-file", str(KNOWLEDGE / "schemathesis.toml")]
    command += ["--no-color", "run", f"{served.url}/openapi.json", "--header", f"Authorization: Bearer {KEY}"]
    command += ["--checks", "all", "--phases", "examples,fuzzing,stateful", "--max-examples", "12", "--seed", "5"]
    done = subprocess.run(
        [*command, "--workers", "2", "--request-timeout", "60", "--generation-database", "none"],
        cwd=tmp_path,
        env={**os.environ, "SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(KNOWLEDGE)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout
    assert "Tested: 17" in done.stdout, done.stdout
    assert "No issues found" in done.stdout, done.stdout

"""The doctor: a machine that serves is told so, and what is wrong is named with what to do."""

from __future__ import annotations

import subprocess
import sys

import pytest

from demo import bundled_model_path, bundled_reward_models
from server.doctor import diagnose
from server.wire.config import WorkerConfig
from tests.support.serving import ROOT

REWARDS = {name: str(path) for name, path in bundled_reward_models().items()}
CONFIG = WorkerConfig(str(bundled_model_path()), REWARDS, device="cpu")


def test_the_bundled_models_can_be_served_here() -> None:
    findings = {finding.what: finding for finding in diagnose(CONFIG)}
    assert {"driver", "torch", "compiler", "model", "disk", "memory"} <= findings.keys()
    assert [str(finding) for finding in findings.values() if finding.what != "driver" and finding.advice] == []
    assert "0.0 GB to fetch" in findings["model"].found


def test_a_model_that_can_neither_be_found_nor_fetched_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (wrong,) = [finding for finding in diagnose(WorkerConfig("nobody/nothing", device="cpu")) if finding.what == "hub"]
    assert "nobody/nothing" in wrong.found
    assert "HF_HUB_OFFLINE" in wrong.advice


def test_a_device_that_is_not_there_ends_the_examination() -> None:
    *_, last = diagnose(WorkerConfig("anything", device="cuda:99"))
    assert last.what == "device"
    assert "cuda:99" in last.advice


def test_the_command_takes_the_servers_settings() -> None:
    command = [sys.executable, "-m", "server", "doctor", "--device", "cuda:99"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (1, "")
    assert "WRONG device     cuda:99" in result.stdout

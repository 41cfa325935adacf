"""The doctor: a machine that serves is told so, and what is wrong is named with what to do."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from demo import bundled_model_path, bundled_reward_models
from server.doctor import checkpoint_of, diagnose
from server.wire.config import RewardSource, WorkerConfig
from tests.support.encoders import write_encoder
from tests.support.serving import ROOT

REWARDS = tuple(RewardSource(name, str(path)) for name, path in bundled_reward_models().items())
CONFIG = WorkerConfig(str(bundled_model_path()), REWARDS, device="cpu")


def test_the_bundled_models_can_be_served_here() -> None:
    findings = {finding.what: finding for finding in diagnose(CONFIG)}
    assert {"driver", "torch", "compiler", "model", "disk", "memory"} <= findings.keys()
    machines = {"driver", "compiler"}
    assert [str(each) for each in findings.values() if each.what not in machines and each.advice] == []
    assert "0.0 GB to fetch" in findings["model"].found


def test_a_model_that_can_neither_be_found_nor_fetched_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (wrong,) = [finding for finding in diagnose(WorkerConfig("nobody/nothing", device="cpu")) if finding.what == "hub"]
    assert "nobody/nothing" in wrong.found
    assert "HF_HUB_OFFLINE" in wrong.advice


def test_a_folder_that_is_not_there_is_wrong() -> None:
    missing = "./models/misspelt/folder"
    (wrong,) = [finding for finding in diagnose(WorkerConfig(missing, device="cpu")) if finding.what == "hub"]
    assert wrong.found == missing


def test_what_was_fetched_before_serves_without_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    repository, commit = tmp_path / "models--someone--model", "c" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / commit).symlink_to(bundled_model_path())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    findings = list(diagnose(WorkerConfig("someone/model", device="cpu")))
    assert not [finding for finding in findings if finding.what == "hub"]
    assert checkpoint_of("someone/model") == checkpoint_of(str(bundled_model_path()))


def test_a_label_that_is_not_there_is_wrong_and_what_is_the_reward_is_told(tmp_path: Path) -> None:
    folder = str(write_encoder(tmp_path))
    sources = RewardSource("mood", folder, "positive"), RewardSource("none", folder), *REWARDS[:1]
    told = [each for each in diagnose(replace(CONFIG, reward_models=sources)) if each.what == "reward"]
    assert [each.found for each in told] == [
        "mood: the logit of label 'positive'; no gradient, reads the response", folder,
        "sentiment: its one logit; a gradient",
    ]  # fmt: skip
    assert [each.advice[:45] for each in told] == ["", "reward model none: label: name one of its 3 l", ""]


def test_the_reward_models_device_is_examined() -> None:
    *_, last = diagnose(replace(CONFIG, reward_device="cuda:99"))
    assert last.what == "device"
    assert last.advice.startswith("reward_device: ")


def test_the_command_takes_the_servers_settings_and_ends_where_there_is_no_device() -> None:
    command = [sys.executable, "-m", "server", "doctor", "--device", "cuda:99"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    *_, last, advice = result.stdout.splitlines()  # without it there is nothing more to examine
    assert last == "WRONG device     cuda:99"
    assert "'cuda:99' cannot be used" in advice

"""How many CPU threads a worker takes when nobody says."""

from __future__ import annotations

import os

import pytest
import torch

from server.engine.service import default_threads


def test_one_core_is_left_to_the_http_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert default_threads(torch.device("cpu")) == 7
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    assert default_threads(torch.device("cpu")) == 1


def test_the_users_word_and_other_devices_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_threads(torch.device("cuda")) == 0
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert default_threads(torch.device("cpu")) == 0

"""How many CPU threads, and which device, a worker takes of several."""

from __future__ import annotations

import os

import pytest
import torch

from server.errors import ConfigurationError
from server.worker.service import default_threads, resolve_device


def test_one_core_is_left_to_the_http_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert default_threads(torch.device("cpu")) == 7
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    assert default_threads(torch.device("cpu")) == 1


def test_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert [default_threads(torch.device("cpu"), workers) for workers in (2, 3, 7, 20)] == [3, 2, 1, 1]


def test_every_worker_may_be_on_the_cpu_and_each_has_its_own_gpu() -> None:
    assert resolve_device("cpu", 3) == torch.device("cpu")
    with pytest.raises(ConfigurationError, match="by worker 99"):
        resolve_device("cuda", 99)


def test_the_users_word_and_other_devices_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_threads(torch.device("cuda")) == 0
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert default_threads(torch.device("cpu")) == 0

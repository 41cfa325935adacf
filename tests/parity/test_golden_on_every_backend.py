"""The authors' recorded runs come out with each kernel implementation that this machine can run."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import kernels
from kernels import dispatch
from tests.support.golden import replay
from tests.support.kernels import choose_kernels


@pytest.mark.parametrize("backend", ["reference", "torch", "cpp"])
def test_recorded_runs_in_float32(pair32: Any, family: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend not in dispatch.available_backends():
        pytest.skip(f"the {backend} backend cannot run here")
    opened: Counter[str] = Counter()
    begin = kernels.begin

    def count(*arguments: Any, **options: Any) -> kernels.Guided:
        state = begin(*arguments, **options)
        opened[state.backend] += 1
        return state

    monkeypatch.setattr(kernels, "choose", lambda device, dtype: backend)
    monkeypatch.setattr(kernels, "begin", count)
    wrong, runs = replay(pair32, family)
    assert not wrong
    assert runs > 20
    assert set(opened) == {backend}


def test_the_compiled_backend_runs_where_a_compiler_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which implementation is chosen is no accident: float64 takes plain torch, float32 the compiled passes if any."""
    choose_kernels(monkeypatch, BACKEND="")
    assert dispatch.choose(torch.device("cpu"), torch.float64) == "torch"
    expected = "cpp" if "cpp" in dispatch.available_backends() else "torch"
    assert dispatch.choose(torch.device("cpu"), torch.float32) == expected
    assert kernels.default_backend() in kernels.BACKENDS

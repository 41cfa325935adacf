"""The engine replays the authors' recorded runs token for token (tests/golden/README.md), all cases in one crowd, with
each kernel implementation that this machine can run."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

import kernels
from kernels import dispatch
from tests.support.golden import golden_jobs, replay
from tests.support.models import BLOCK_CAUSAL, FAMILIES

pytestmark = pytest.mark.parametrize("family", [*FAMILIES, *BLOCK_CAUSAL], scope="session")


def test_every_recorded_run_comes_out_in_float64(pair64: Any, family: str) -> None:
    wrong, count = replay(pair64, family)
    assert not wrong
    assert count >= 12


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
    assert runs >= 12
    assert set(opened) == {backend}


@pytest.mark.parametrize("number", range(0, 35, 7))
def test_the_plain_loop_replays_recorded_runs(pair64: Any, family: str, number: int) -> None:
    recorded = list(golden_jobs(pair64, family))
    job, tokens, reward = recorded[number % len(recorded)]
    result = pair64.plain.run(job)
    assert result.token_ids == [tokens]
    assert result.rewards[0] == pytest.approx(reward, abs=1e-3)

"""The engine replays the authors' recorded runs token for token (tests/golden/README.md), all cases in one crowd."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.golden import golden_jobs, replay


def test_every_recorded_run_comes_out_in_float64(pair64: Any, family: str) -> None:
    wrong, count = replay(pair64, family)
    assert not wrong
    assert count > 20


def test_every_recorded_run_comes_out_in_float32(pair32: Any, family: str) -> None:
    wrong, _ = replay(pair32, family)
    assert not wrong


@pytest.mark.parametrize("number", range(0, 40, 8))
def test_the_plain_loop_replays_recorded_runs(pair64: Any, family: str, number: int) -> None:
    job, tokens, reward = list(golden_jobs(pair64, family))[number]
    result = pair64.plain.run(job)
    assert result.token_ids == [tokens]
    assert result.rewards[0] == pytest.approx(reward, abs=1e-3)

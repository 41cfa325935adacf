"""The rule of resampling on numbers. What it gives of a model is in tests/worker/test_resample_law.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import NotFinite
from server.guidance.resample import Particles, ancestors, effective_share, normalised
from server.types import Resampling
from tests.support.jobs import make_job

LOGS = st.lists(st.floats(-30, 30), min_size=1, max_size=12).map(np.array)


def particles(count: int = 2, **rule: object) -> Particles:
    resampling = Resampling(**rule)  # type: ignore[arg-type]
    return Particles.of(make_job(best_of=count, resample=resampling), resampling)


@given(LOGS, st.floats(0, 1, exclude_max=True))
def test_every_particle_has_its_share_of_children_rounded_down_or_up(logs: np.ndarray, uniform: float) -> None:  # type: ignore[type-arg]
    weights = normalised(logs)
    assert weights == pytest.approx(np.exp(logs) / np.exp(logs).sum())
    chosen = ancestors(weights, uniform)
    assert list(chosen) == sorted(chosen)
    for index, weight in enumerate(weights):
        expected = weight * len(weights)
        assert math.floor(expected - 1e-9) <= chosen.count(index) <= math.ceil(expected + 1e-9)


def test_the_effective_share_is_one_of_equal_particles_and_one_in_k_of_a_single_one() -> None:
    assert effective_share(normalised(np.zeros(4))) == 1.0
    assert effective_share(normalised(np.array([0.0, -1000.0, -1000.0, -1000.0]))) == 0.25


def test_weights_grow_until_they_are_resampled_and_begin_anew_then() -> None:
    few = particles(strength=2.0, threshold=0.7)
    assert few.meet(8, [0.1, 0.0]).log_weights == [0.2, 0.0]
    assert few.resampled == []
    meeting = few.meet(16, [3.0, 1.0])  # since the beginning, for nothing was copied
    assert (meeting.log_weights, meeting.ancestors) == ([6.0, 2.0], (0, 0))
    assert few.resampled == [(16, (0, 0))]
    assert few.meet(24, [3.5, 3.0]).log_weights == [1.0, 0.0]  # both come from a particle that had 3
    assert few.weights([3.0, 3.0]) == (0.5, 0.5)
    assert few.weights([3.0, None]) is None


def test_the_best_reward_of_a_lineage_counts_but_at_the_end_the_last_one() -> None:
    few = particles(potential="max", threshold=0.1)
    assert few.meet(8, [2.0, 1.0]).log_weights == [2.0, 1.0]
    assert few.meet(16, [0.0, 1.5]).log_weights == [2.0, 1.5]
    assert few.weights([0.0, 0.0]) == (0.5, 0.5)


@pytest.mark.parametrize("potential", ["difference", "max"])
@pytest.mark.parametrize("score", [math.nan, math.inf, 1e308])
def test_what_is_not_finite_is_refused(potential: str, score: float) -> None:
    few = particles(potential=potential, strength=2.0)
    few.meet(8, [0.0, 0.0])
    with pytest.raises(NotFinite):
        few.meet(16, [0.0, score])
    with pytest.raises(NotFinite):
        few.weights([0.0, score])

"""Ranking and revealing: order, ties, EOS last, the distribution of random reveals, and rules that choose how many."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from server.diffusion.sampler import above_threshold, entropy_bounded, rank, reveal
from server.diffusion.schedule import Step
from server.types import DiffusionParams

NONE = np.zeros(4, dtype=bool)
SPREAD = -np.array([3.0, 0.5, 7.0, 2.0])

# Multiples of 1/8, so that sums are exact and bounds are met exactly too.
EIGHTHS = st.integers(0, 24).map(lambda n: n / 8)


def revealed(
    confidence: Any, eos: Any = None, count: int = 1, *, probability: float = 0.0, uniforms: Any = None, **values: Any
) -> list[int]:
    """What a step of `count` tokens reveals; for the adaptive algorithms that is the least that they may."""
    confidence = np.asarray(confidence, dtype=float)
    step = Step(0, 1.0, 0, len(confidence), count, len(confidence) - count, probability, 0)
    eos = np.zeros(len(confidence), dtype=bool) if eos is None else np.asarray(eos)
    return reveal(DiffusionParams(8, **values), step, confidence, eos, uniforms).tolist()


def test_ties_go_to_the_lower_position_and_eos_ranks_last_by_its_own_confidence() -> None:
    assert rank(np.array([0.5, 0.9, 0.9, 0.5]), NONE).tolist() == [1, 2, 0, 3]
    eos = np.array([True, False, True, False])
    assert rank(np.array([0.8, 0.1, 0.9, 0.2]), eos).tolist() == [3, 1, 2, 0]
    assert revealed([0.8, 0.1, 0.9, 0.2], eos, 2) == [1, 3]
    assert revealed([0.8, 0.1, 0.9, 0.2], eos, 2, deprioritize_eos=False) == [0, 2]


def test_random_reveals_follow_softmax_without_replacement() -> None:
    """Pairs drawn of four candidates against the exact Plackett-Luce probabilities."""
    confidence, temperature, draws = np.array([0.3, -0.2, 0.1, 0.9]), 0.7, 40_000
    weight = np.exp(confidence / temperature)
    weight /= weight.sum()
    exact = {
        pair: sum(weight[a] * weight[b] / (1 - weight[a]) for a, b in (pair, pair[::-1]))
        for pair in itertools.combinations(range(4), 2)
    }
    counts: dict[Any, int] = dict.fromkeys(exact, 0)
    for row in np.random.default_rng(0).random((draws, 4)):
        counts[tuple(revealed(confidence, count=2, algorithm_temperature=temperature, uniforms=row))] += 1
    assert chisquare(list(counts.values()), [draws * exact[pair] for pair in counts]).pvalue > 1e-3


def test_random_reveals_take_eos_only_when_nothing_else_is_left() -> None:
    eos = np.array([True, False, True, False])
    for row in np.random.default_rng(1).random((200, 4)):
        chosen = revealed([9.0, 0.0, 9.0, 0.0], eos, 3, algorithm_temperature=1.0, uniforms=row)
        assert {1, 3} < set(chosen)


@pytest.mark.parametrize("values", [{"algorithm_temperature": 1.0}, {"algorithm": "origin"}])
def test_random_reveals_without_uniforms_are_an_error(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="uniforms"):
        revealed([0.0, 0.0], **values)


@pytest.mark.parametrize(("probability", "count"), [(1.0, 100), (0.0, 0)])
def test_origin_reveals_all_at_probability_one_and_none_at_zero(probability: float, count: int) -> None:
    uniforms = np.random.default_rng(2).random(100)
    assert len(revealed(np.zeros(100), algorithm="origin", probability=probability, uniforms=uniforms)) == count


def bounded(confidence: Any, eos: Any, bound: float, count: int = 1, **values: Any) -> list[int]:
    return revealed(confidence, eos, count, algorithm="entropy_bound", entropy_bound=bound, **values)


def above(confidence: Any, eos: Any, threshold: float, count: int = 1, **values: Any) -> list[int]:
    return revealed(confidence, eos, count, algorithm="threshold", confidence_threshold=threshold, **values)


@given(entropies=st.lists(EIGHTHS, min_size=1, max_size=8), bound=EIGHTHS)
def test_entropy_bound_takes_the_largest_set_of_the_papers_inequality(entropies: list[float], bound: float) -> None:
    """Against every subset of the positions: none that is larger satisfies it, and the chosen one does."""
    chosen = bounded(-np.array(entropies), None, bound)
    kept = [
        subset
        for size in range(1, len(entropies) + 1)
        for subset in itertools.combinations(range(len(entropies)), size)
        if math.fsum(entropies[i] for i in subset) - max(entropies[i] for i in subset) <= bound
    ]
    assert tuple(chosen) in kept
    assert len(chosen) == max(len(subset) for subset in kept)
    assert max(entropies[i] for i in chosen) <= min((h for i, h in enumerate(entropies) if i not in chosen), default=99)


@given(
    positions=st.lists(st.tuples(EIGHTHS, st.booleans()), min_size=1, max_size=12), bound=EIGHTHS, last=st.booleans()
)
def test_entropy_bound_with_eos_last_takes_the_longest_beginning_of_the_ranking(
    positions: list[tuple[float, bool]], bound: float, last: bool
) -> None:
    order = sorted(range(len(positions)), key=lambda i: (last and positions[i][1], positions[i][0], i))
    longest = max(
        n
        for n in range(1, len(order) + 1)
        if sum(positions[i][0] for i in order[:n]) - max(positions[i][0] for i in order[:n]) <= bound
    )
    chosen = bounded([-h for h, _ in positions], [flag for _, flag in positions], bound, deprioritize_eos=last)
    assert chosen == sorted(order[:longest])


@given(confidence=st.lists(EIGHTHS.map(lambda p: p / 3), min_size=1, max_size=12), value=EIGHTHS.map(lambda p: p / 3))
def test_threshold_reveals_every_position_above_it_and_at_least_one(confidence: list[float], value: float) -> None:
    expected = [i for i, p in enumerate(confidence) if p > value]
    assert above(confidence, None, value) == (expected or [confidence.index(max(confidence))])


def test_eos_waits_under_a_threshold_until_all_others_are_revealed() -> None:
    confidence, eos = [0.99, 0.95, 0.5, 0.98], [True, False, False, True]
    assert above(confidence, eos, 0.9) == [1]
    assert above(confidence, eos, 0.4) == [0, 1, 2, 3]
    assert above(confidence, eos, 0.9, deprioritize_eos=False) == [0, 1, 3]


def test_bounds_at_their_ends_reveal_everything_or_the_least() -> None:
    assert len(bounded(SPREAD, ~NONE, 1000.0)) == len(above(np.exp(SPREAD), ~NONE, 0.0)) == 4
    assert bounded(SPREAD, NONE, 0.0, 3) == [0, 1, 3]
    assert above(SPREAD, NONE, 1.0, 4) == [0, 1, 2, 3]


def test_rounding_decides_nothing() -> None:
    """1e-20 + 1.0 - 1.0 is 0 in floating point, and would pass for no entropy."""
    assert above_threshold(np.array([1.0000001, 1.0]), 1.0) == 0  # nothing exceeds certainty
    assert entropy_bounded(np.array([1e-20, 1.0]), 0.0) == 1
    assert entropy_bounded(np.array([0.0, 0.0, 1.0, 1.0]), 0.0) == 3
    assert entropy_bounded(np.array([-1e-7, 0.5, 0.5]), 0.0) == 2  # a rounding error is no entropy

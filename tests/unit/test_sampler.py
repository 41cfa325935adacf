"""Ranking and revealing: order, ties, EOS last, the distribution of random reveals, and rules that choose how many."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from server.diffusion.sampler import (
    above_threshold,
    entropy_bounded,
    rank,
    reveal_adaptively,
    reveal_independently,
    reveal_most_confident,
)
from server.types import DiffusionParams

NONE = np.zeros(4, dtype=bool)

# Multiples of 1/8, so that sums are exact and bounds are met exactly too.
EIGHTHS = st.integers(0, 24).map(lambda n: n / 8)


def test_equal_confidence_goes_to_the_lower_position() -> None:
    assert rank(np.array([0.5, 0.9, 0.9, 0.5]), NONE).tolist() == [1, 2, 0, 3]


def test_eos_ranks_after_all_others_and_by_its_own_confidence() -> None:
    eos = np.array([True, False, True, False])
    assert rank(np.array([0.8, 0.1, 0.9, 0.2]), eos).tolist() == [3, 1, 2, 0]


def test_without_the_eos_rule_only_confidence_counts() -> None:
    eos = np.array([True, False, True, False])
    chosen = reveal_most_confident(np.array([0.8, 0.1, 0.9, 0.2]), eos, 2, deprioritize_eos=False)
    assert chosen.tolist() == [0, 2]


def test_random_reveals_follow_softmax_without_replacement() -> None:
    """Pairs drawn of four candidates against the exact Plackett-Luce probabilities."""
    confidence, temperature, draws = np.array([0.3, -0.2, 0.1, 0.9]), 0.7, 40_000
    weight = np.exp(confidence / temperature)
    weight /= weight.sum()
    exact = {
        pair: sum(weight[a] * weight[b] / (1 - weight[a]) for a, b in (pair, pair[::-1]))
        for pair in itertools.combinations(range(4), 2)
    }
    uniforms = np.random.default_rng(0).random((draws, 4))
    counts = dict.fromkeys(exact, 0)
    for row in uniforms:
        chosen = reveal_most_confident(
            confidence, NONE, 2, deprioritize_eos=True, algorithm_temperature=temperature, uniforms=row
        )
        counts[tuple(int(index) for index in chosen)] += 1  # type: ignore[index]
    assert chisquare(list(counts.values()), [draws * exact[pair] for pair in counts]).pvalue > 1e-3


def test_random_reveals_take_eos_only_when_nothing_else_is_left() -> None:
    eos = np.array([True, False, True, False])
    for row in np.random.default_rng(1).random((200, 4)):
        chosen = reveal_most_confident(
            np.array([9.0, 0.0, 9.0, 0.0]),
            eos,
            3,
            deprioritize_eos=True,
            algorithm_temperature=1.0,
            uniforms=row,
        )
        assert {1, 3} < set(chosen.tolist())


def test_random_reveals_without_uniforms_are_an_error() -> None:
    with pytest.raises(ValueError, match="uniforms"):
        reveal_most_confident(np.zeros(2), NONE[:2], 1, deprioritize_eos=True, algorithm_temperature=1.0)


def test_origin_reveals_all_at_probability_one_and_none_at_zero() -> None:
    uniforms = np.random.default_rng(2).random(100)
    assert len(reveal_independently(uniforms, 1.0)) == 100
    assert len(reveal_independently(uniforms, 0.0)) == 0


def entropy_bound(bound: float, *, deprioritize_eos: bool = True) -> DiffusionParams:
    return DiffusionParams(8, "entropy_bound", entropy_bound=bound, deprioritize_eos=deprioritize_eos)


def threshold(value: float, *, deprioritize_eos: bool = True) -> DiffusionParams:
    return DiffusionParams(8, "threshold", confidence_threshold=value, deprioritize_eos=deprioritize_eos)


@given(entropies=st.lists(EIGHTHS, min_size=1, max_size=8), bound=EIGHTHS)
def test_entropy_bound_takes_the_largest_set_of_the_papers_inequality(entropies: list[float], bound: float) -> None:
    """Against every subset of the positions: none that is larger satisfies it, and the chosen one does."""
    no_eos = np.zeros(len(entropies), dtype=bool)
    chosen = reveal_adaptively(-np.array(entropies), no_eos, 1, entropy_bound(bound)).tolist()
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
    entropies, eos = np.array([h for h, _ in positions]), np.array([flag for _, flag in positions])
    chosen = reveal_adaptively(-entropies, eos, 1, entropy_bound(bound, deprioritize_eos=last))
    assert chosen.tolist() == sorted(order[:longest])


@given(confidence=st.lists(EIGHTHS.map(lambda p: p / 3), min_size=1, max_size=12), value=EIGHTHS.map(lambda p: p / 3))
def test_threshold_reveals_every_position_above_it_and_at_least_one(confidence: list[float], value: float) -> None:
    chosen = reveal_adaptively(np.array(confidence), np.zeros(len(confidence), dtype=bool), 1, threshold(value))
    above = [i for i, p in enumerate(confidence) if p > value]
    assert chosen.tolist() == (above or [confidence.index(max(confidence))])


def test_eos_waits_under_a_threshold_until_all_others_are_revealed() -> None:
    confidence, eos = np.array([0.99, 0.95, 0.5, 0.98]), np.array([True, False, False, True])
    assert reveal_adaptively(confidence, eos, 1, threshold(0.9)).tolist() == [1]
    assert reveal_adaptively(confidence, eos, 1, threshold(0.4)).tolist() == [0, 1, 2, 3]
    assert reveal_adaptively(confidence, eos, 1, threshold(0.9, deprioritize_eos=False)).tolist() == [0, 1, 3]


def test_a_bound_of_nothing_reveals_what_entropy_reveals_one_at_a_time() -> None:
    for seed in range(100):
        rng = np.random.default_rng(seed)
        confidence, eos = -rng.exponential(size=6), rng.random(6) < 0.5
        alone = reveal_most_confident(confidence, eos, 1, deprioritize_eos=True)
        assert reveal_adaptively(confidence, eos, 1, entropy_bound(0.0)).tolist() == alone.tolist()


def test_a_bound_without_end_and_a_threshold_of_nothing_reveal_everything() -> None:
    confidence = -np.array([3.0, 0.5, 7.0, 2.0])
    assert len(reveal_adaptively(confidence, ~NONE, 1, entropy_bound(1000.0))) == 4
    assert len(reveal_adaptively(np.exp(confidence), ~NONE, 1, threshold(0.0))) == 4


def test_the_least_number_is_revealed_whatever_the_rule_says() -> None:
    confidence = -np.array([3.0, 0.5, 7.0, 2.0])
    assert reveal_adaptively(confidence, NONE, 3, entropy_bound(0.0)).tolist() == [0, 1, 3]
    assert reveal_adaptively(confidence, NONE, 9, threshold(1.0)).tolist() == [0, 1, 2, 3]


def test_rounding_decides_nothing() -> None:
    """1e-20 + 1.0 - 1.0 is 0 in floating point, and would pass for no entropy."""
    assert above_threshold(np.array([1.0000001, 1.0]), 1.0) == 0  # nothing exceeds certainty
    assert entropy_bounded(np.array([1e-20, 1.0]), 0.0) == 1
    assert entropy_bounded(np.array([0.0, 0.0, 1.0, 1.0]), 0.0) == 3
    assert entropy_bounded(np.array([-1e-7, 0.5, 0.5]), 0.0) == 2  # a rounding error is no entropy

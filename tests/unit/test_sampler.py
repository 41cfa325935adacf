"""Ranking and revealing: order, ties, EOS last, and the distribution of random reveals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import chisquare

from server.diffusion.sampler import rank, reveal_independently, reveal_most_confident

NONE = np.zeros(4, dtype=bool)


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

"""Choosing the n best of K trajectories by final reward."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from server.types import WeightedReward


def total_reward(rewards: Sequence[WeightedReward], values: Mapping[str, float | None]) -> float | None:
    """The weighted sum of `values`, by name of the reward; None where one is missing or there is none."""
    known = [each.weight * value for each in rewards if (value := values[each.model]) is not None]
    return math.fsum(known) if rewards and len(known) == len(rewards) else None


def choose(scores: Sequence[float | None], n: int, *, ranked: bool) -> tuple[int, ...]:
    """Indices of the n answers: when `ranked` by score, best first (equal scores: the lower index; one that has none
    comes last), else in order."""
    order = list(range(len(scores)))
    if ranked:
        order.sort(key=lambda index: -math.inf if (score := scores[index]) is None else score, reverse=True)
    return tuple(order[:n])

"""Choosing the n best of K trajectories by final reward."""

from __future__ import annotations

from collections.abc import Sequence


def choose(rewards: Sequence[float | None], n: int, *, ranked: bool) -> tuple[int, ...]:
    """Indices of the n answers, best first when `ranked` (equal rewards: the lower index), else in order."""
    indices = range(len(rewards))
    if not ranked:
        return tuple(indices)[:n]
    return tuple(sorted(indices, key=lambda index: (-(rewards[index] or 0.0), index))[:n])

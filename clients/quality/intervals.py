"""Means and shares with 95% intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from scipy import stats


@dataclass(frozen=True)
class Interval:
    """A mean and half the width of its 95% interval (Student's t; 0 for a single value)."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """The mean of the values and its interval. Raises ValueError without values."""
        if not values:
            raise ValueError("an interval needs at least one value")
        if len(values) == 1:
            return cls(values[0], 0.0)
        return cls(fmean(values), float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)))

    @property
    def low(self) -> float:
        """The lower end."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """The upper end."""
        return self.mean + self.half

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.half:.2f}"


def share_interval(hits: int, total: int) -> tuple[float, float, float]:
    """(share, low, high): Wilson's 95% interval of a share. Raises ValueError without cases."""
    if total < 1:
        raise ValueError("a share needs at least one case")
    found = stats.binomtest(hits, total).proportion_ci(method="wilson")
    return hits / total, float(found.low), float(found.high)

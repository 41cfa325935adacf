"""Means with 95% intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev


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
        return cls(fmean(values), t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values)))

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


def t_quantile(freedom: int, probability: float = 0.975) -> float:
    """Student's t quantile by the Cornish-Fisher expansion; right to 0.01 from 5 degrees of freedom on."""
    z = NormalDist().inv_cdf(probability)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def share_interval(hits: int, total: int) -> tuple[float, float, float]:
    """(share, low, high): Wilson's 95% interval of a share."""
    if total < 1:
        raise ValueError("a share needs at least one case")
    z = NormalDist().inv_cdf(0.975)
    share = hits / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return share, centre - half, centre + half

"""Trial runs: what a device computed in one way is believed once it agrees with another way on a small case."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

TOLERANCE = 0.05
"""How far results in 16 bits may be off, relative to the norm: rounding makes a tenth of it, and what is wrong
(a mask, a length, stale memory) several times as much."""


def difference(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The largest distance of a tensor from the one that was expected, relative to the norm of that; NaN where there is
    one."""
    pairs = zip(found, expected, strict=True)
    return float(torch.stack([(a.double() - b.double()).norm() / b.double().norm() for a, b in pairs]).max())

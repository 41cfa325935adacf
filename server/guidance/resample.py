"""Resampling: which particles go on (algorithm.md, section 5). Numbers in, ancestors out; all in float64.

The trajectories of a job are particles. When they meet, each has a score s, and its weight is exp(strength x (s - its
lineage's s at the last resampling)), so that the product of a lineage's weights is exp(strength x its last s) and
the weighted particles follow the law p(x) exp(strength x s(x)). Where few of them have nearly all of the weight, the K
are drawn anew among themselves, by systematic resampling (Doucet and Johansen 2009, "A tutorial on particle filtering
and smoothing", section 3.4).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from server.diffusion.sampler import FloatArray


def normalised(log_weights: Sequence[float]) -> FloatArray:
    """Weights (K,) that sum to 1. Raises ValueError where one is not finite."""
    logs = np.asarray(log_weights, dtype=np.float64)
    if not np.isfinite(logs).all():
        raise ValueError(f"the particles' log weights are not all finite: {logs.tolist()}")
    weights: FloatArray = np.exp(logs - logs.max())
    weights /= weights.sum()
    return weights


def effective_share(weights: FloatArray) -> float:
    """The effective sample size of normalised weights (K,) as a share of K: 1 where all are equal, 1 / K where one has
    everything."""
    return float(1.0 / (len(weights) * np.square(weights).sum()))


def ancestors(weights: FloatArray, uniform: float) -> tuple[int, ...]:
    """Of each child, whose copy it is: child k's ancestor is the first particle at which the cumulative weight exceeds
    (k + u) / K, u being one `uniform` in [0, 1). So a particle of weight w has floor(wK) or ceil(wK) children."""
    count = len(weights)
    chosen = np.searchsorted(weights.cumsum(), (np.arange(count) + uniform) / count, side="right")
    last = int(np.flatnonzero(weights)[-1])  # rounding may leave the sum a little below 1
    return tuple(np.minimum(chosen, last).tolist())

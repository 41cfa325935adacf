"""Resampling: which particles go on (algorithm.md, section 5). Scores in, ancestors out; all in float64.

The trajectories of a job are particles. When they meet, each has a score s, and its weight is exp(strength x (s - its
lineage's s at the last resampling)), so that the product of a lineage's weights is exp(strength x its last s) and
the weighted particles follow the law p(x) exp(strength x s(x)). Where few of them have nearly all of the weight, the K
are drawn anew among themselves, by systematic resampling (Doucet and Johansen 2009, "A tutorial on particle filtering
and smoothing", section 3.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from kernels.random import INNER_RESAMPLE, row_keys, uniform
from server.diffusion.sampler import FloatArray
from server.errors import NotFinite
from server.types import Job, Resampling


def normalised(log_weights: FloatArray) -> FloatArray:
    """Weights (K,) that sum to 1. Raises NotFinite."""
    if not np.isfinite(log_weights).all():
        raise NotFinite("the scores by which trajectories are resampled are not all finite")
    weights: FloatArray = np.exp(log_weights - log_weights.max())
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


class Meeting(NamedTuple):
    """What comes of a meeting: log weights (K,), the effective sample size as a share of K and, for each place, whose
    copy goes on in it; None where nothing is copied."""

    log_weights: list[float]
    share: float
    ancestors: tuple[int, ...] | None


@dataclass(slots=True)
class Particles:
    """What resampling keeps of a job's K trajectories between their meetings: of each one's lineage the `best` reward
    so far and the score at its `last` resampling, both (K,). They last `met` after so many steps. `resampled` has a row
    for each time that some were copied: how many steps had been taken, and each place's ancestor."""

    job: Job
    rule: Resampling
    best: FloatArray
    last: FloatArray
    met: int = 0
    resampled: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)

    @classmethod
    def of(cls, job: Job, rule: Resampling) -> Particles:
        """Of a job before its first step."""
        return cls(job, rule, np.full(job.sampling.best_of, -np.inf), np.zeros(job.sampling.best_of))

    def meet(self, step: int, scores: Sequence[float]) -> Meeting:
        """After so many steps, with the reward that each would have now, or the log probability so far. Raises
        NotFinite."""
        now: FloatArray = np.asarray(scores, dtype=np.float64)
        if self.rule.potential == "max":
            now = self.best = np.maximum(self.best, now)
        log_weights = self._log_weights(now)
        weights, self.met = normalised(log_weights), step
        share, chosen = effective_share(weights), None
        if share < self.rule.threshold:
            chosen = ancestors(weights, self._uniform(step))
            self.best, self.last = self.best[list(chosen)], now[list(chosen)]
            self.resampled.append((step, chosen))
        return Meeting(log_weights.tolist(), share, chosen)

    def weights(self, scores: Sequence[float | None]) -> tuple[float, ...] | None:
        """The normalised weights (K,) at the end, by final reward or total log probability; None where one is missing.
        Raises NotFinite."""
        if None in scores:
            return None
        return tuple(normalised(self._log_weights(np.asarray(scores, dtype=np.float64))).tolist())

    def _log_weights(self, scores: FloatArray) -> FloatArray:
        with np.errstate(all="ignore"):  # what is not finite is refused where weights are made of it
            result: FloatArray = self.rule.strength * (scores - self.last)
        return result

    def _uniform(self, step: int) -> float:
        """The one random number of a meeting, keyed as trajectory 0's at position 0 (algorithm.md, section 1.4)."""
        key = self.job.sampling.seed, self.job.prompt_index, 0, step, INNER_RESAMPLE, 0
        return float(uniform(row_keys(*(torch.tensor([number]) for number in key)), 0))

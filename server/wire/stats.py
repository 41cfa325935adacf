"""What the worker counts for the metrics: gauges of this moment, and sums that only grow while the worker
lives.

The runner updates a `RunnerStats` in place; heartbeats carry it to the HTTP process, which keeps the sums
growing across worker restarts (`RunnerStats.plus`). Plain numbers: no metrics library, no tensors.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field, fields

SECONDS_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
COUNT_BOUNDS = (
    1.0,
    2.0,
    4.0,
    8.0,
    16.0,
    32.0,
    64.0,
    128.0,
    256.0,
    512.0,
    1024.0,
    2048.0,
    4096.0,
    8192.0,
    16384.0,
)


@dataclass(slots=True)
class Distribution:
    """A histogram: `counts[i]` values were at most `bounds[i]` and above the bound before it, `counts[-1]`
    were above all bounds; `total` is the sum of the values."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        if not self.counts:
            self.counts = [0] * (len(self.bounds) + 1)

    @property
    def count(self) -> int:
        """How many values were added."""
        return sum(self.counts)

    def add(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def plus(self, other: Distribution) -> Distribution:
        """The values of both, as a new histogram over the same bounds."""
        counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        return Distribution(self.bounds, counts, self.total + other.total)

    def reset(self) -> None:
        """Forget all values."""
        self.counts = [0] * len(self.counts)
        self.total = 0.0


def _seconds() -> Distribution:
    return Distribution(SECONDS_BOUNDS)


def _sizes() -> Distribution:
    return Distribution(COUNT_BOUNDS)


@dataclass(slots=True)
class RunnerStats:
    """Gauges: trajectories that run and wait now. Counters: trajectory steps done, tokens revealed, and how often
    memory ran out. Distributions, one value a denoising step: seconds of each phase (of guidance where there was any),
    trajectories and masked rows in the batch."""

    running: int = 0
    waiting: int = 0
    denoising_steps: int = 0
    committed_tokens: int = 0
    out_of_memory: int = 0
    model_forward_seconds: Distribution = field(default_factory=_seconds)
    guidance_seconds: Distribution = field(default_factory=_seconds)
    reward_forward_seconds: Distribution = field(default_factory=_seconds)
    reward_backward_seconds: Distribution = field(default_factory=_seconds)
    batch_trajectories: Distribution = field(default_factory=_sizes)
    batch_rows: Distribution = field(default_factory=_sizes)

    def plus(self, other: RunnerStats) -> RunnerStats:
        """Field by field sum: the history of dead workers and the present of a live one."""
        total = RunnerStats()
        for each in fields(self):
            mine, theirs = getattr(self, each.name), getattr(other, each.name)
            setattr(total, each.name, mine.plus(theirs) if isinstance(mine, Distribution) else mine + theirs)
        return total

    def reset(self) -> None:
        """Start counting afresh (after the warm-up, which no client asked for)."""
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Distribution):
                value.reset()
            else:
                setattr(self, each.name, 0)

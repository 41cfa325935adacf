"""What the worker counts for the metrics: gauges of this moment, and sums that only grow while the worker lives.

The runner updates a `RunnerStats` in place; heartbeats carry it to the HTTP process, which keeps the sums
growing across worker restarts (`RunnerStats.plus`). Plain numbers: no metrics library, no tensors.
"""

from __future__ import annotations

import mmap
from bisect import bisect_left
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

SECONDS_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
SHARE_BOUNDS = tuple(tenth / 10 for tenth in range(1, 11))
COUNT_BOUNDS = tuple(2.0**power for power in range(15))
STATM = Path("/proc/self/statm")  # Linux: sizes of this process, in pages; the second is what is resident


def resident_bytes() -> int:
    """Memory of this process; 0 where the system does not say."""
    return int(STATM.read_text().split()[1]) * mmap.PAGESIZE if STATM.exists() else 0


@dataclass(slots=True)
class Distribution:
    """A histogram: `counts[i]` values were at most `bounds[i]` and above the bound before it, `counts[-1]`
    were above all bounds; `total` is the sum of the values."""

    bounds: tuple[float, ...] = SECONDS_BOUNDS
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    @property
    def count(self) -> int:
        """How many values were added."""
        return sum(self.counts)

    def add(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def __add__(self, other: Distribution) -> Distribution:
        counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        return Distribution(self.bounds, counts, self.total + other.total)


@dataclass(slots=True)
class RunnerStats:
    """Gauges: trajectories that run and wait now, bytes resident and bytes held on the device. Counters: trajectory
    steps done, tokens revealed, how often memory ran out, and how often trajectories were copied over others.
    Distributions, one value a denoising step: seconds of each phase (of guidance where there was any), trajectories and
    masked rows in the batch; and one value for each time that a job's trajectories met: the effective sample size as a
    share of them."""

    running: int = 0
    waiting: int = 0
    resident_bytes: int = 0
    device_bytes: int = 0
    denoising_steps: int = 0
    committed_tokens: int = 0
    out_of_memory: int = 0
    resamplings: int = 0
    model_forward_seconds: Distribution = field(default_factory=Distribution)
    guidance_seconds: Distribution = field(default_factory=Distribution)
    reward_forward_seconds: Distribution = field(default_factory=Distribution)
    reward_backward_seconds: Distribution = field(default_factory=Distribution)
    batch_trajectories: Distribution = field(default_factory=lambda: Distribution(COUNT_BOUNDS))
    batch_rows: Distribution = field(default_factory=lambda: Distribution(COUNT_BOUNDS))
    effective_share: Distribution = field(default_factory=lambda: Distribution(SHARE_BOUNDS))

    @property
    def steps(self) -> int:
        """Denoising steps done, whatever number of trajectories shared each."""
        return self.batch_trajectories.count

    def ended(self) -> RunnerStats:
        """What stays of a process that is no more: the sums."""
        return replace(self, running=0, waiting=0, resident_bytes=0, device_bytes=0)

    def plus(self, other: RunnerStats) -> RunnerStats:
        """Field by field sum: the history of dead workers and the present of a live one."""
        return RunnerStats(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))

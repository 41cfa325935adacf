"""How the offline benchmarks measure: which models, how often, in what order, and what a row of a report holds.

Variants that are compared run in turn (a, b, b, a, a, ...), each round on a fresh set of requests that they share,
so that neither a slow minute of the machine nor lucky requests favour one. Ratios are taken within a round; reported
is their median, and of times the least and the median.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.checkpoints import LLADA_126K, write_llada, write_pair
from benchmarks.flops import Flops
from benchmarks.machine import Rate, gemm_rate
from benchmarks.report import Figure, Row
from benchmarks.workload import Pair, Run, Workload, load, only_first_trajectory, run_engine, run_one_by_one, run_plain
from server.types import Job
from server.worker.savings import Savings

Measure = Callable[[int], Run]
"""One run of a variant on the request set of that number."""


@dataclass(slots=True)
class Bench:
    """The models, loaded when first asked for, and how thorough to be. `folder` takes generated checkpoints; `dlm`
    and `rm` are used in place of the generated pair."""

    folder: Path
    device: torch.device
    dtype: torch.dtype
    quick: bool
    repetitions: int
    first_set: int = 0
    dlm: Path | None = None
    rm: Path | None = None
    _pairs: dict[tuple[str, torch.dtype], Pair] = field(default_factory=dict)

    def pair(self, dtype: torch.dtype | None = None) -> Pair:
        """The generated pair (V = 16,384, 13 M and 5 M parameters), or the one that was named."""
        key = ("pair", dtype or self.dtype)
        if key not in self._pairs:
            dlm, rm = (self.dlm, self.rm) if self.dlm else write_pair(self.folder)
            self._pairs[key] = load(dlm, rm, key[1], self.device)
        return self._pairs[key]

    def llada(self, dtype: torch.dtype) -> Pair:
        """The LLaDA-shaped model (V = 126,464), without a reward model."""
        key = ("llada", dtype)
        if key not in self._pairs:
            self._pairs.clear()  # one such model at a time is enough memory
            folder = write_llada(self.folder / f"llada-{dtype}".replace(".", "-"), LLADA_126K, dtype=dtype)
            self._pairs[key] = load(folder, None, dtype, self.device)
        return self._pairs[key]

    def choose(self, full: Workload, quick: Workload) -> Workload:
        """The workload of the present form."""
        return quick if self.quick else full

    def rate(self, dtype: torch.dtype) -> Rate:
        """The matrix-product rate at this moment."""
        return gemm_rate(dtype, self.device, seconds=0.2 if self.quick else 0.5)

    def in_turn(
        self, variants: Mapping[str, Measure], *, title: str, repetitions: int | None = None
    ) -> dict[str, list[Run]]:
        """Run all variants in each round; the runs of each, by round."""
        runs: dict[str, list[Run]] = {name: [] for name in variants}
        names = list(variants)
        work = []
        for repetition in range(repetitions or self.repetitions):
            order = names if repetition % 2 == 0 else names[::-1]
            work += [(self.first_set + repetition, name) for name in order]
        progress = tqdm(work, desc=title, leave=False)
        for number, name in progress:
            progress.set_postfix_str(name)
            runs[name].append(variants[name](number))
        return runs


def engine(pair: Pair, workload: Workload, savings: Savings | None = None) -> Measure:
    """The engine, all of the workload's jobs at once."""
    return lambda number: run_engine(pair, workload.jobs(pair, number), savings)


def one_by_one(pair: Pair, workload: Workload) -> Measure:
    """The engine, one job after the other."""
    return lambda number: run_one_by_one(pair, workload.jobs(pair, number))


def plain(pair: Pair, workload: Workload, sample: Callable[[list[Job]], list[Job]] = lambda jobs: jobs) -> Measure:
    """The plain loop, on all jobs or a sample of them."""
    return lambda number: run_plain(pair, sample(workload.jobs(pair, number)))


def first_trajectory(jobs: list[Job]) -> list[Job]:
    """A sample: the first job, with K = 1."""
    return [only_first_trajectory(jobs[0])]


def warm_up(pair: Pair, workload: Workload) -> None:
    """Lazy initialisation, compilation, the allocator and caches, before anything is timed."""
    jobs = workload.jobs(pair, request_set=999)
    run_engine(pair, jobs[:1])


def row(runs: Sequence[Run], rate: Rate, **labels: Any) -> Row:
    """The row of one variant. Times: the least and the median over its runs; phases and operations: of the median."""
    ordered = sorted(runs, key=lambda run: run.seconds)
    middle = ordered[(len(ordered) - 1) // 2]
    cpu = median(run.cpu_seconds for run in runs)
    found: Row = labels | {
        "seconds": median(run.seconds for run in runs),
        "least_seconds": ordered[0].seconds,
        "cpu_seconds": cpu,
        "tokens": middle.tokens,
        "tokens_per_s": median(run.tokens_per_s for run in runs),
        "repetitions": len(runs),
    }
    if middle.flops is not None:
        found |= {
            "gflop": middle.flops.total / 1e9,
            "gflop_by_phase": {name: flops / 1e9 for name, flops in middle.flops.by_phase().items()},
            "seconds_by_phase": middle.phases(),
            "utilisation": utilisation(runs, rate),
            "cpu_utilisation": cpu_utilisation(runs, rate),
            "utilisation_by_phase": {
                name: flops / middle.phases()[name] / rate.wall
                for name, flops in middle.flops.by_phase().items()
                if middle.phases()[name] > 0
            },
        }
    return found


def counted(run: Run) -> Flops:
    """The operations of an engine run. ValueError for the plain loop's, which are not counted."""
    if run.flops is None:
        raise ValueError("operations are counted for the engine only")
    return run.flops


def utilisation(runs: Iterable[Run], rate: Rate) -> float:
    """Counted operations over what the measured rate would have done in the same wall time; the median."""
    return median(counted(run).total / run.seconds for run in runs) / rate.wall


def cpu_utilisation(runs: Iterable[Run], rate: Rate) -> float:
    """`utilisation` by CPU time, of the work as well as of the rate."""
    return median(counted(run).total / run.cpu_seconds for run in runs) / rate.cpu


def ratio(slower: Sequence[Run], faster: Sequence[Run]) -> float:
    """How many times the second is faster than the first, by time per token; the median over the rounds they share."""
    return median((a.seconds / a.tokens) / (b.seconds / b.tokens) for a, b in zip(slower, faster, strict=False))


def both_clocks(name: str, slower: Sequence[Run], faster: Sequence[Run], at_least: float | None = None) -> list[Figure]:
    """`ratio`, which has to hold the bound, and `cpu_ratio` beside it."""
    return [
        Figure(name, ratio(slower, faster), at_least=at_least),
        Figure(f"{name}, by CPU time", cpu_ratio(slower, faster)),
    ]


def cpu_ratio(slower: Sequence[Run], faster: Sequence[Run]) -> float:
    """`ratio` by CPU time."""
    return median((a.cpu_seconds / a.tokens) / (b.cpu_seconds / b.tokens) for a, b in zip(slower, faster, strict=False))

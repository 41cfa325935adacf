"""The ways to run a workload that the cases compare, as measures: request set number -> one run."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.harness import Measure
from benchmarks.workload import Pair, Workload, only_first_trajectory, run_engine, run_one_by_one, run_plain
from server.types import Job
from server.worker.savings import Savings


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

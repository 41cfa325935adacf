"""What replicas would do under load: python -m benchmarks.simulate [--case ...] [--validate http]

replicas    1, 8 and 64 replicas at 80% of their capacity, for each way to choose among them
budgets     one replica with 1 to 64 requests in flight, for two values of `batch_trajectories`
load        one replica at shares of its capacity, with Poisson arrivals and with bursts
sizes       Dream-7B with each Skywork reward model on 1 to 8 GPUs, at 80% of their capacity

A step of an H100 is that of `benchmarks.gpu.estimate`: all of this is simulated, on an estimate. `--validate` compares
simulated with real runs on this CPU instead (`benchmarks.simulated_cpu`). Prints tables and one JSON line; writes the
same to `--out`, for `python -m benchmarks.plots`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from rich.console import Console
from tqdm import tqdm

from benchmarks.flops import Decoder
from benchmarks.gpu import sizes
from benchmarks.gpu.estimate import FLOPS, LAUNCH, REACHED, Canvas, seconds, work
from benchmarks.gpu.models import DREAM, REWARDS
from benchmarks.report import CaseResult, Row, keep, show
from benchmarks.simulated_cpu import CLOCKS, validate
from benchmarks.simulator import POLICIES, Load, Outcome, Replica, around, simulate
from server.budget import Budget
from server.types import Job

LEAST = 8  # replicas' worth of requests in a run, however few replicas
LAUNCHES = 300  # of a step or of a part of it
GPU = "80 GB"
DREAM_7B = Decoder.of(DREAM)
POISSON = Load()


@dataclass(frozen=True, slots=True)
class H100:
    """The estimate's step for Dream-7B and a reward model; what is more than `budget` holds runs in parts."""

    judge: Decoder
    budget: Budget

    def __call__(self, step: Sequence[Canvas], begun: Sequence[Job], ended: Sequence[Job]) -> float:
        rows = sum(canvas.masked for canvas in step if canvas.gradient_steps)
        parts = max(1, math.ceil(rows / self.budget.guided_rows))
        device = sum(seconds(work(DREAM_7B, self.judge, DREAM.vocab_size, step)).values())
        texts = sum(around(self.judge, begun, ended)) / (FLOPS * REACHED[0])
        return max(device, parts * LAUNCHES * LAUNCH) + texts


@dataclass(frozen=True)
class Question:
    """Dream-7B and a reward model (its size), within a GPU's budget, under a load of so many requests a replica."""

    reward: str
    budget: Budget
    requests: int
    load: Load = POISSON

    @cached_property
    def cost(self) -> H100:
        """Of a step."""
        return H100(Decoder.of(REWARDS[self.reward]), self.budget)

    @cached_property
    def capacity(self) -> float:
        """Requests a second of one replica that has 16 until no more come; the end of the run makes it a little low."""
        outcome = self.closed(16)
        return len(outcome.answered) / outcome.seconds

    def row(self, outcome: Outcome, seconds: float, replicas: int = 1) -> Row:
        """One line of a table. Rates are of the `seconds` in which requests came, whose last ones are then waited for;
        `has` is how many requests a replica has on average, by Little's law."""
        row = outcome.row(self.cost)
        rates = {name: row[name] * outcome.seconds / seconds for name in ("requests_per_s", "tokens_per_s")}
        return row | rates | {"has": sum(latency for _, latency, _ in outcome.answered) / seconds / replicas}

    def closed(self, in_flight: int, trajectories: int = 256) -> Outcome:
        """One replica that always has so many requests."""
        jobs = self.load.jobs(max(self.requests * LEAST, 4 * in_flight), seed=1)
        replica = Replica(self.cost, replace(self.budget, trajectories=trajectories))
        return simulate(jobs, [0.0] * len(jobs), [replica], in_flight=in_flight)

    def open(self, share: float, replicas: int = 1, policy: str = "least work") -> Row:
        """So many replicas to which a share of their capacity arrives."""
        count = self.requests * max(LEAST, replicas)
        due = self.load.arrivals(share * self.capacity * replicas, count, seed=3)
        each = [Replica(self.cost, self.budget) for _ in range(replicas)]
        labels = {"replicas": replicas, "policy": policy, "share": share}
        return labels | self.row(simulate(self.load.jobs(count, seed=2), due, each, policy=policy), due[-1], replicas)

    def case(self, name: str) -> Iterator[Row]:
        """The rows of a case."""
        row: Row
        if name == "budgets":
            for most in (16, 256):
                for in_flight in (1, 2, 4, 8, 16, 64):
                    row = {
                        "variant": f"{most}, {in_flight} in flight",
                        "batch_trajectories": most,
                        "in_flight": in_flight,
                    }
                    outcome = self.closed(in_flight, most)
                    yield row | self.row(outcome, outcome.seconds)
        elif name == "load":
            for burstiness in (1.0, 2.0):
                under = replace(self, load=replace(self.load, burstiness=burstiness))
                for share in (0.2, 0.4, 0.6, 0.7, 0.8, 0.9):
                    row = {"variant": f"{share:.0%}, bursts of {burstiness:g}", "burstiness": burstiness}
                    yield row | under.open(share)
        elif name == "replicas":
            for count in (1, 8, 64):
                for policy in POLICIES:
                    yield {"variant": f"{count}, {policy}"} | self.open(0.8, count, policy)
        else:
            for count in (1, 2, 4, 8):
                yield {"variant": f"{self.reward}, {count} GPUs", "reward": self.reward} | self.open(0.8, count)


def main() -> int:
    """Simulate, print tables, then one JSON line."""
    cases = ("replicas", "budgets", "load", "sizes")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=cases, default=cases, help="default: all")
    ways = "over HTTP, or to the engine by this process's clock or the wall's"
    parser.add_argument(
        "--validate", choices=("http", *CLOCKS), help=f"compare with real runs on this CPU instead, {ways}"
    )
    parser.add_argument("--requests", type=int, default=40, help="of each real run or simulated replica (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="for the JSON")
    given = parser.parse_args()
    if given.validate:
        found = [asyncio.run(validate(given.validate, given.requests))]
    else:
        asked = {
            size: Question(size, sizes.budgets(footprint, weights, GPU)[0], given.requests)
            for name, size, weights, _, footprint in sizes.pairs()
            if name == "Dream-7B"
        }
        found = []
        for case in given.case:
            questions = asked.values() if case == "sizes" else [asked["1.7B"]]
            rows = [row for question in questions for row in tqdm(question.case(case), desc=case, leave=False)]
            found.append(CaseResult(case, rows))
    document: Row = {"bench": "validation" if given.validate else "simulated", "machine": platform.machine()}
    show(found, Console(width=200, highlight=False))
    print(json.dumps(keep(document, found, given.out)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

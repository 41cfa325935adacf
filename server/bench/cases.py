"""The cases of the offline benchmark: each measures one claim about the engine and says what came out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

from server.bench.harness import Bench, CaseResult, Figure, Measure, cpu_ratio, ratio, row, utilisation, warm_up
from server.bench.workload import (
    Pair,
    Workload,
    only_first_trajectory,
    run_engine,
    run_one_by_one,
    run_plain,
    same_tokens,
)
from server.engine.savings import Savings
from server.types import Job

HEADLINE = Workload()
SMALL = Workload(prompts=2, best_of=2, max_tokens=32, steps=16)
PUBLISHED_SECONDS = 137.0
"""What the authors' code takes for the headline case on two cores of this kind."""


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


def headline(bench: Bench) -> CaseResult:
    """The engine against the plain loop, guided, and its utilisation at concurrency 16."""
    pair = bench.pair()
    work = bench.choose(HEADLINE, SMALL)
    many = replace(work, prompts=16)
    warm_up(pair, work)
    before = bench.rate(pair.dtype)
    runs = bench.in_turn({"engine": engine(pair, work)}, title="headline: engine")
    loop = bench.in_turn({"plain": plain(pair, work)}, title="headline: plain loop", repetitions=1)["plain"]
    sixteen = bench.in_turn({"engine": engine(pair, many)}, title="headline: 16 requests", repetitions=1)["engine"]
    rate = before.max(bench.rate(pair.dtype))
    seconds = loop[0].seconds * HEADLINE.tokens / work.tokens
    figures = [
        Figure("headline: times the plain loop's tokens/s", ratio(loop, runs["engine"]), at_least=6.0),
        Figure("headline: the same by CPU time", cpu_ratio(loop, runs["engine"])),
        Figure("headline: utilisation at concurrency 16", utilisation(sixteen, rate), at_least=0.5),
        Figure("headline: share of trajectories with the plain loop's tokens", same_tokens(loop[0], runs["engine"][0])),
    ]
    if not bench.quick:
        figures.append(Figure("headline: plain loop, seconds", seconds, at_most=PUBLISHED_SECONDS))
    rows = [
        row(runs["engine"], rate, variant=f"engine, {work.prompts} requests at once"),
        row(sixteen, rate, variant="engine, 16 requests at once"),
        row(loop, rate, variant="plain loop, one request at a time"),
    ]
    return CaseResult("headline", rows, figures, rate.wall / 1e9)


def unguided(bench: Bench) -> CaseResult:
    """Unguided: sixteen requests at once against one at a time."""
    pair = bench.pair()
    full = replace(HEADLINE, method="none", prompts=16, best_of=1)
    work = bench.choose(full, replace(full, max_tokens=32, steps=16))
    warm_up(pair, work)
    before = bench.rate(pair.dtype)
    variants = {"16 at once": engine(pair, work), "one at a time": one_by_one(pair, work)}
    runs = bench.in_turn(variants, title="unguided")
    runs["plain loop"] = [plain(pair, work, lambda jobs: jobs[:4])(bench.first_set)]
    rate = before.max(bench.rate(pair.dtype))
    together, apart = runs["16 at once"], runs["one at a time"]
    figures = [
        Figure("unguided: 16 at once, times one at a time", ratio(apart, together), at_least=3.0),
        Figure("unguided: the same by CPU time", cpu_ratio(apart, together)),
        Figure("unguided: times the plain loop", ratio(runs["plain loop"], together)),
        Figure("unguided: share of same tokens, at once and one at a time", same_tokens(together[0], apart[0])),
    ]
    return CaseResult(
        "unguided", [row(each, rate, variant=name) for name, each in runs.items()], figures, rate.wall / 1e9
    )


def ablation(bench: Bench) -> CaseResult:
    """Every exact saving switched off by itself, and all of them at once."""
    pair = bench.pair()
    work = bench.choose(HEADLINE, SMALL)
    warm_up(pair, work)
    names = [saving.name for saving in fields(Savings)]
    before = bench.rate(pair.dtype)
    # Steps that reveal nothing exist only where T exceeds L.
    long = replace(work, steps=2 * work.max_tokens)
    variants = {"all savings": engine(pair, work)}
    variants |= {name: engine(pair, work, Savings.without([name])) for name in names if name != "skip_empty_steps"}
    variants["none of them"] = engine(pair, work, Savings.without(names))
    variants["all savings, T = 2 L"] = engine(pair, long)
    variants["skip_empty_steps"] = engine(pair, long, Savings.without(["skip_empty_steps"]))
    runs = bench.in_turn(variants, title="ablation")
    rate = before.max(bench.rate(pair.dtype))
    rows = []
    for name, each in runs.items():
        base = runs["all savings, T = 2 L" if name in ("skip_empty_steps", "all savings, T = 2 L") else "all savings"]
        found = row(each, rate, variant=name if name.startswith("all") or name == "none of them" else f"no {name}")
        found["times_slower"], found["cpu_times_slower"] = ratio(each, base), cpu_ratio(each, base)
        found["same_tokens"] = same_tokens(each[0], base[0])
        rows.append(found)
    figures = [Figure(f"ablation: {entry['variant']}, times slower", entry["times_slower"]) for entry in rows]
    figures.append(Figure("ablation: least share of same tokens", min(entry["same_tokens"] for entry in rows)))
    return CaseResult("ablation", rows, figures, rate.wall / 1e9)


CASES: dict[str, Callable[[Bench], CaseResult]] = {"headline": headline, "unguided": unguided, "ablation": ablation}

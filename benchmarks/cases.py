"""The cases of the offline benchmark: each measures one claim about the engine and says what came out."""

from __future__ import annotations

from dataclasses import fields, replace

import torch

from benchmarks.harness import (
    Bench,
    CaseResult,
    Figure,
    Row,
    both_clocks,
    counted,
    cpu_ratio,
    cpu_utilisation,
    ratio,
    row,
    utilisation,
    warm_up,
)
from benchmarks.shapes import best, ideal_seconds, own_shapes, rates
from benchmarks.variants import engine, one_by_one, plain
from benchmarks.workload import Workload, run_engine, run_plain, same_tokens
from server.types import METHODS
from server.worker.savings import Savings

HEADLINE = Workload()
SMALL = Workload(prompts=2, best_of=2, max_tokens=32, steps=16)
EXACT = Workload(prompts=2, best_of=2, max_tokens=12, steps=24)
PUBLISHED_SECONDS = 137.0
"""What the authors' code takes for the headline case on two cores of this kind."""


def headline(bench: Bench) -> CaseResult:
    """The engine against the plain loop, guided, and its utilisation at concurrency 16."""
    pair = bench.pair()
    work = bench.choose(HEADLINE, SMALL)
    many = replace(work, prompts=16)
    warm_up(pair, work)
    shapes = own_shapes(pair, many)
    before, own_before = bench.rate(pair.dtype), rates(pair, shapes)
    runs = bench.in_turn({"engine": engine(pair, work)}, title="headline: engine")["engine"]
    sixteen = bench.in_turn({"engine": engine(pair, many)}, title="headline: 16 requests", repetitions=1)["engine"]
    rate, own = before.max(bench.rate(pair.dtype)), best(own_before, rates(pair, shapes))
    loop = bench.in_turn({"plain": plain(pair, work)}, title="headline: plain loop", repetitions=1)["plain"]
    figures = [
        *both_clocks("headline: times the plain loop's tokens/s", loop, runs, at_least=6.0),
        Figure("headline: utilisation at concurrency 16", utilisation(sixteen, rate), at_least=0.5),
        Figure("headline: utilisation at concurrency 16, by CPU time", cpu_utilisation(sixteen, rate)),
        Figure(
            "headline: utilisation at concurrency 16, of the rate at its own shapes",
            ideal_seconds(counted(sixteen[0]), own) / sixteen[0].seconds,
        ),
        Figure("headline: share of trajectories with the plain loop's tokens", same_tokens(loop[0], runs[0])),
    ]
    if not bench.quick:
        figures.append(Figure("headline: plain loop, seconds", loop[0].seconds, at_most=PUBLISHED_SECONDS))
    figures += [
        Figure(f"headline: GFLOP/s of the product {m} x {k} x {n} ({kind})", own[kind].wall / 1e9)
        for kind, (m, k, n) in shapes.items()
    ]
    rows = [
        row(runs, rate, variant=f"engine, {work.prompts} requests at once"),
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
        *both_clocks("unguided: 16 at once, times one at a time", apart, together, at_least=3.0),
        *both_clocks("unguided: times the plain loop", runs["plain loop"], together),
        Figure("unguided: share of same tokens, at once and one at a time", same_tokens(together[0], apart[0])),
    ]
    return CaseResult(
        "unguided", [row(each, rate, variant=name) for name, each in runs.items()], figures, rate.wall / 1e9
    )


def ablation(bench: Bench) -> CaseResult:
    """Every exact saving switched off by itself, and all of them at once, each next to a run with all of them: so near
    in time that a machine whose speed drifts does not tip the ratio."""
    pair = bench.pair()
    work = bench.choose(replace(HEADLINE, steps=16), SMALL)
    warm_up(pair, work)
    names = [saving.name for saving in fields(Savings)]
    # Steps that reveal nothing exist only where T exceeds L, and inner steps to share between requests of different M.
    own_work = {
        "skip_empty_steps": (", T = 2 L", replace(work, max_tokens=work.max_tokens // 2, steps=work.max_tokens)),
        "share_inner_steps": (", mixed M", replace(work, least_gradient_steps=1)),
    }
    without = {"none of them": (work, Savings.without(names))}
    for name in names:
        suffix, theirs = own_work.get(name, ("", work))
        without[f"no {name}{suffix}"] = (theirs, Savings.without([name]))
    before = bench.rate(pair.dtype)
    runs = {
        name: bench.in_turn({"all": engine(pair, theirs), name: engine(pair, theirs, savings)}, title=name)
        for name, (theirs, savings) in without.items()
    }
    rate = before.max(bench.rate(pair.dtype))
    rows, figures = [], []
    for name, both in runs.items():
        for variant, each in ((f"all, beside {name}", both["all"]), (name, both[name])):
            found = row(each, rate, variant=variant)
            found["times_slower"], found["cpu_times_slower"] = ratio(each, both["all"]), cpu_ratio(each, both["all"])
            found["same_tokens"] = same_tokens(each[0], both["all"][0])
            rows.append(found)
        figures += both_clocks(f"ablation: {name}, times slower", both[name], both["all"])
    figures.append(Figure("ablation: least share of same tokens", min(entry["same_tokens"] for entry in rows)))
    return CaseResult("ablation", rows, figures, rate.wall / 1e9)


def guided_over_unguided(bench: Bench) -> CaseResult:
    """The same requests guided (entrgi) and not: the ratio of their times over the ratio of their operations."""
    pair = bench.pair()
    work = bench.choose(HEADLINE, SMALL)
    without = replace(work, method="none")
    warm_up(pair, work)
    before = bench.rate(pair.dtype)
    variants = {"entrgi": engine(pair, work), "none": engine(pair, without)}
    runs = bench.in_turn(variants, title="guided over unguided")
    rate = before.max(bench.rate(pair.dtype))
    guided, unguided_ = runs["entrgi"], runs["none"]
    times, cpu_times = ratio(guided, unguided_), cpu_ratio(guided, unguided_)
    operations = counted(guided[0]).total / counted(unguided_[0]).total
    figures = [
        Figure("guided over unguided: ratio of times", times),
        Figure("guided over unguided: ratio of operations", operations),
        Figure("guided over unguided: the gap between them", times / operations, at_most=1.3),
        Figure("guided over unguided: the gap by CPU time", cpu_times / operations),
    ]
    rows = [row(each, rate, variant=name) for name, each in runs.items()]
    return CaseResult("guided_over_unguided", rows, figures, rate.wall / 1e9)


def exactness(bench: Bench) -> CaseResult:
    """In float64, the engine's tokens are the plain loop's: every method, every saving on and off, mixed batches."""
    pair = bench.pair(torch.float64)
    work = bench.choose(replace(EXACT, max_tokens=24, steps=48), EXACT)
    jobs = {method: replace(work, method=method).jobs(pair, number) for number, method in enumerate(METHODS)}
    oracle = {method: run_plain(pair, each) for method, each in jobs.items()}
    rate = bench.rate(pair.dtype)
    rows: list[Row] = []

    def check(variant: str, savings: Savings) -> None:
        mixed = run_engine(pair, [job for each in jobs.values() for job in each], savings)
        rows.append(
            row([mixed], rate, variant=f"all methods in one batch, {variant}")
            | {"same_tokens": min(same_tokens(each, mixed) for each in oracle.values())}
        )

    for method, each in jobs.items():
        run = run_engine(pair, each)
        rows.append(row([run], rate, variant=method) | {"same_tokens": same_tokens(oracle[method], run)})
    names = [saving.name for saving in fields(Savings)]
    check("all savings", Savings())
    for name in names:
        check(f"no {name}", Savings.without([name]))
    check("no saving", Savings.without(names))
    least = min(entry["same_tokens"] for entry in rows)
    figures = [Figure("exactness: least share of trajectories with the plain loop's tokens", least, at_least=1.0)]
    return CaseResult("exactness", rows, figures, rate.wall / 1e9)

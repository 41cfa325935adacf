"""The cases of the offline benchmark: each measures one claim about the engine and says what came out."""

from __future__ import annotations

from dataclasses import fields, replace

import torch

from benchmarks.harness import (
    Bench,
    both_clocks,
    counted,
    cpu_ratio,
    cpu_utilisation,
    engine,
    first_trajectory,
    one_by_one,
    plain,
    ratio,
    row,
    utilisation,
    warm_up,
)
from benchmarks.machine import Rate
from benchmarks.report import CaseResult, Figure, Row
from benchmarks.workload import Run, Workload, run_engine, run_plain, same_tokens
from server.methods import METHODS
from server.worker.savings import Savings

HEADLINE = Workload()
SMALL = Workload(prompts=2, best_of=2, max_tokens=32, steps=16)
EXACT = Workload(prompts=2, best_of=2, max_tokens=12, steps=24)
LLADA = Workload(
    method="none",
    prompts=8,
    best_of=1,
    max_tokens=64,
    steps=32,
    temperature=0.0,
    top_p=1.0,
    prompt_tokens=20,
    algorithm="maskgit_plus",
)
LLADA_SMALL = replace(LLADA, prompts=4, max_tokens=16, steps=8)
DTYPES = (torch.bfloat16, torch.float32)
AT_ONCE = (1, 4, 16)
"""Trajectories of one prompt, for the ablation."""
PUBLISHED_SECONDS = 137.0
"""What the authors' code takes for the headline case on two cores of this kind."""


def headline(bench: Bench) -> CaseResult:
    """The engine against the plain loop, guided, and its utilisation at concurrency 16."""
    pair = bench.pair()
    work = bench.choose(HEADLINE, SMALL)
    many = replace(work, prompts=16)
    warm_up(pair, work)
    before = bench.rate(pair.dtype)
    runs = bench.in_turn({"engine": engine(pair, work)}, title="headline: engine")["engine"]
    sixteen = bench.in_turn({"engine": engine(pair, many)}, title="headline: 16 requests", repetitions=1)["engine"]
    rate = before.max(bench.rate(pair.dtype))
    loop = bench.in_turn({"plain": plain(pair, work)}, title="headline: plain loop", repetitions=1)["plain"]
    figures = [
        *both_clocks("headline: times the plain loop's tokens/s", loop, runs, at_least=6.0),
        Figure("headline: utilisation at concurrency 16", utilisation(sixteen, rate), at_least=0.5),
        Figure("headline: utilisation at concurrency 16, by CPU time", cpu_utilisation(sixteen, rate)),
        Figure("headline: tokens/s, 16 requests at once over 4", ratio(runs, sixteen), at_least=1.0),
        Figure("headline: share of trajectories with the plain loop's tokens", same_tokens(loop[0], runs[0])),
    ]
    if not bench.quick:
        figures.append(Figure("headline: plain loop, seconds", loop[0].seconds, at_most=PUBLISHED_SECONDS))
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
    """Every exact saving switched off by itself, and all of them at once, for 1, 4 and 16 trajectories. Each runs next
    to a run with all savings, so near in time that a machine whose speed drifts does not tip the ratio."""
    pair = bench.pair()
    base = replace(bench.choose(replace(HEADLINE, steps=16), SMALL), prompts=1)
    warm_up(pair, base)
    names = [saving.name for saving in fields(Savings)]
    before = bench.rate(pair.dtype)
    rows, figures = [], []
    for at_once in AT_ONCE:
        for name in ["none of them", *names]:
            suffix, work = own_work(name, replace(base, best_of=at_once))
            label = f"K = {at_once}, {name if name == 'none of them' else f'no {name}{suffix}'}"
            savings = Savings.without([name] if name in names else names)
            both = bench.in_turn({"all": engine(pair, work), name: engine(pair, work, savings)}, title=label)
            for variant, each in ((f"all, beside {label}", both["all"]), (label, both[name])):
                found = row(each, before, variant=variant)
                found["times_slower"], found["cpu_times_slower"] = (
                    ratio(each, both["all"]),
                    cpu_ratio(each, both["all"]),
                )
                found["same_tokens"] = same_tokens(each[0], both["all"][0])
                rows.append(found)
            figures += both_clocks(f"ablation: {label}, times slower", both[name], both["all"])
    figures.append(Figure("ablation: least share of same tokens", min(entry["same_tokens"] for entry in rows)))
    return CaseResult("ablation", rows, figures, before.wall / 1e9)


def own_work(saving: str, work: Workload) -> tuple[str, Workload]:
    """The work on which a saving has something to save, and what is said of it where that is not the usual one."""
    if saving == "skip_empty_steps":  # there are steps that reveal nothing only where T exceeds L
        return ", T = 2 L", replace(work, max_tokens=work.max_tokens // 2, steps=work.max_tokens)
    if saving == "share_inner_steps":  # requests of different M
        requests = min(work.best_of, 4)
        mixed = replace(work, prompts=requests, best_of=work.best_of // requests, least_gradient_steps=1)
        return f", {requests} requests of mixed M", mixed
    if saving == "leave_when_final":  # a model trained to end its texts, which `--bundled` has
        return ", texts alone", replace(work, text_only=True)
    return "", work


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


def llada(bench: Bench) -> CaseResult:
    """Eight unguided requests on the LLaDA-shaped model, against the FLOP floor (LM head on masked rows only)."""
    work = bench.choose(LLADA, LLADA_SMALL)
    rows: list[Row] = []
    figures: list[Figure] = []
    rates = []
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        pair = bench.llada(dtype)
        warm_up(pair, work)
        before = fastest(bench, dtype)
        runs = bench.in_turn({"engine": engine(pair, work)}, title=f"llada {name}")["engine"]
        loop = plain(pair, work, first_trajectory)(bench.first_set)
        rate = before.max(fastest(bench, dtype))
        rates.append(rate.wall / 1e9)
        floor = floor_tokens_per_s(runs[0], rate)
        found = row(runs, rate, variant=f"{name}, {work.prompts} requests at once")
        found |= {"gemm_gflops": rate.wall / 1e9, "floor_tokens_per_s": floor}
        rows += [found, row([loop], rate, variant=f"{name}, plain loop, one request")]
        figures += [
            Figure(f"llada: {name}, tokens/s", found["tokens_per_s"]),
            Figure(f"llada: {name}, floor in tokens/s at the best GEMM rate", floor),
            Figure(
                f"llada: {name}, share of the floor",
                utilisation(runs, rate),
                at_least=0.5 if dtype == torch.bfloat16 else None,
            ),
            Figure(f"llada: {name}, share of the floor by CPU time", found["cpu_utilisation"]),
        ]
    return CaseResult("llada", rows, figures, max(rates))


def fastest(bench: Bench, dtype: torch.dtype) -> Rate:
    """The best rate for weights of that dtype: without instructions for bfloat16 a processor does better in float32,
    and so does the engine."""
    return bench.rate(dtype).max(bench.rate(torch.float32))


def floor_tokens_per_s(run: Run, rate: Rate) -> float:
    """Tokens a second if the run's operations went at the measured rate and nothing else took time."""
    return run.tokens * rate.wall / counted(run).total

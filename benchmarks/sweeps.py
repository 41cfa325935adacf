"""The cases that vary one thing and look how time follows: concurrency, method, T, M, K, prompts, L, prompt length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from benchmarks.cases import HEADLINE, SMALL
from benchmarks.harness import (
    Bench,
    both_clocks,
    cpu_ratio,
    engine,
    first_trajectory,
    plain,
    ratio,
    row,
    warm_up,
)
from benchmarks.machine import Rate
from benchmarks.report import CaseResult, Figure, Row
from benchmarks.workload import Pair, Run, Workload, same_tokens
from server.methods import METHODS
from server.worker.savings import Savings


@dataclass(frozen=True, slots=True)
class Fit:
    """A straight line through (x, y): its R^2, and the exponent of the power law through the same points."""

    r_squared: float
    exponent: float

    @classmethod
    def of(cls, x: Sequence[float], y: Sequence[float]) -> Fit:
        """Least squares. ValueError with fewer than three points, or with values that are not positive."""
        if len(x) < 3 or len(x) != len(y) or min(*x, *y) <= 0:
            raise ValueError("a fit needs three positive points at least")
        xs, ys = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
        slope, intercept = np.polyfit(xs, ys, 1)
        residual = float(((ys - slope * xs - intercept) ** 2).sum())
        spread = float(((ys - ys.mean()) ** 2).sum())
        exponent = float(np.polyfit(np.log(xs), np.log(ys), 1)[0])
        return cls(1.0 - residual / spread if spread else 1.0, exponent)


def concurrency(bench: Bench) -> CaseResult:
    """Throughput with 1, 4, 16 and 64 requests at once (K = 1), guided and not, beside the plain loop."""
    pair = bench.pair()
    counts = (1, 4, 16) if bench.quick else (1, 4, 16, 64)
    base = replace(bench.choose(HEADLINE, SMALL), best_of=1)
    warm_up(pair, base)
    before = bench.rate(pair.dtype)
    methods: tuple[str, ...] = ("entrgi", "none")
    works = {(method, count): replace(base, method=method, prompts=count) for method in methods for count in counts}
    runs = bench.in_turn(
        {f"{method}, {count}": engine(pair, work) for (method, count), work in works.items()}, title="concurrency"
    )
    loops = {method: [plain(pair, works[method, 1], first_trajectory)(bench.first_set)] for method in methods}
    rate = before.max(bench.rate(pair.dtype))
    rows: list[Row] = []
    figures: list[Figure] = []
    for method, count in works:
        each = runs[f"{method}, {count}"]
        rows.append(
            against_plain(each, loops[method], rate, variant=f"{method}, {count}", method=method, at_once=count)
        )
    for method in methods:
        alone, most = runs[f"{method}, 1"], runs[f"{method}, {counts[-1]}"]
        figures += both_clocks(f"concurrency: {method}, {counts[-1]} at once over 1", alone, most)
    return CaseResult("concurrency", rows, figures, rate.wall / 1e9)


def method(bench: Bench) -> CaseResult:
    """Throughput by method, beside the plain loop."""
    pair = bench.pair()
    base = bench.choose(HEADLINE, SMALL)
    works = {name: replace(base, method=name) for name in METHODS}
    rows, rate, _ = swept(bench, pair, {name: (name, work) for name, work in works.items()}, "method")
    return CaseResult("method", rows, [], rate.wall / 1e9)


def linear(bench: Bench) -> CaseResult:
    """Cost by T, M, K, number of prompts, L and prompt length, each with all else fixed. Only the full form runs the
    plain loop as well."""
    pair = bench.pair()
    base = replace(bench.choose(HEADLINE, SMALL), prompts=2)
    length = base.max_tokens
    few = bench.quick
    sweeps: dict[str, dict[int, Workload]] = {
        "T": {
            t: replace(base, steps=t) for t in (length // 8, length // 4, length // 2, length, 2 * length, 4 * length)
        },
        "M": {m: replace(base, gradient_steps=m) for m in ((1, 2, 4) if few else (1, 2, 3, 4, 6))},
        "K": {k: replace(base, best_of=k) for k in ((1, 2, 4) if few else (1, 2, 4, 8))},
        "prompts": {n: replace(base, prompts=n) for n in ((1, 2, 4) if few else (1, 2, 4, 8))},
        "L": {length * n // 4: replace(base, max_tokens=length * n // 4, steps=length * n // 8) for n in (1, 2, 4, 8)},
        "prompt words": {n: replace(base, prompt_words=n) for n in ((12, 50, 100) if few else (12, 50, 100, 200))},
    }
    points = {f"{name} = {x}": (x, work) for name, works in sweeps.items() for x, work in works.items()}
    rows, rate, runs = swept(bench, pair, points, "linear", with_plain=not bench.quick)
    figures = []
    for name, works in sweeps.items():
        seconds = [least(runs[f"{name} = {x}"]) for x in works]
        cpu = [min(run.cpu_seconds for run in runs[f"{name} = {x}"]) for x in works]
        for entry in rows:
            if entry["variant"].startswith(f"{name} = "):
                entry["sweep"] = name
        if name == "T":
            figures += steps_figures(list(works), seconds, length, "")
            figures += steps_figures(list(works), cpu, length, " by CPU time")
        elif name == "prompt words":
            tokens = [float(len(work.jobs(pair)[0].prompt_ids)) for work in works.values()]
            reward = [min(run.reward_seconds for run in runs[f"{name} = {x}"]) for x in works]
            figures.append(
                Figure("linear: reward part by prompt tokens, exponent", Fit.of(tokens, reward).exponent, at_most=0.999)
            )
            figures.append(Figure("linear: all by prompt tokens, exponent", Fit.of(tokens, seconds).exponent))
        elif name != "L":
            fit = Fit.of(list(works), seconds)
            figures.append(Figure(f"linear: {name}, R^2 of a straight line", fit.r_squared, at_least=0.98))
            figures.append(Figure(f"linear: {name}, the same by CPU time", Fit.of(list(works), cpu).r_squared))
            figures.append(Figure(f"linear: {name}, exponent", fit.exponent, at_most=1.1))
    return CaseResult("linear", rows, figures, rate.wall / 1e9)


def steps_figures(steps: Sequence[int], seconds: Sequence[float], length: int, clock: str) -> list[Figure]:
    """Figures for T: time is a straight line up to L, and steps beyond L cost nothing."""
    upto = [(t, s) for t, s in zip(steps, seconds, strict=True) if t <= length]
    beyond = [s for t, s in zip(steps, seconds, strict=True) if t > length]
    fit = Fit.of([t for t, _ in upto], [s for _, s in upto])
    bounds: dict[str, Any] = {"at_least": 0.98} if not clock else {}
    flat: dict[str, Any] = {"at_most": 1.15} if not clock else {}
    return [
        Figure(f"linear: T up to L, R^2 of a straight line{clock}", fit.r_squared, **bounds),
        Figure(f"linear: T beyond L, over the cost at T = L{clock}", median(beyond) / upto[-1][1], **flat),
    ]


def prefix_share(bench: Bench) -> CaseResult:
    """What the shared, cached reward prefix is worth by prompt length and K."""
    pair = bench.pair()
    base = replace(bench.choose(HEADLINE, SMALL), prompts=2)
    words = (12, 100) if bench.quick else (12, 50, 200)
    works = {(n, k): replace(base, prompt_words=n, best_of=k) for n in words for k in (1, 4)}
    warm_up(pair, base)
    before = bench.rate(pair.dtype)
    variants = {}
    for (n, k), work in works.items():
        variants[f"{n} words, K = {k}, cached"] = engine(pair, work)
        variants[f"{n} words, K = {k}, not"] = engine(pair, work, Savings.without(["reward_prefix_cache"]))
    runs = bench.in_turn(variants, title="prefix share")
    rate = before.max(bench.rate(pair.dtype))
    rows: list[Row] = []
    figures: list[Figure] = []
    for n, k in works:
        cached, apart = (runs[f"{n} words, K = {k}, {which}"] for which in ("cached", "not"))
        for which, each in (("cached", cached), ("not cached", apart)):
            found = row(each, rate, variant=f"{n} words, K = {k}, {which}")
            found["reward_seconds"] = median(run.reward_seconds for run in each)
            found["prefix_seconds"] = median(run.prefix_seconds for run in each)
            found["same_tokens"] = same_tokens(each[0], cached[0])
            rows.append(found)
        reward = median(a.reward_seconds / b.reward_seconds for a, b in zip(apart, cached, strict=True))
        figures.append(Figure(f"prefix: {n} words, K = {k}, reward part, times slower without", reward))
        figures += both_clocks(f"prefix: {n} words, K = {k}, all, times slower without", apart, cached)
    return CaseResult("prefix_share", rows, figures, rate.wall / 1e9)


def swept(
    bench: Bench, pair: Pair, points: dict[str, tuple[Any, Workload]], title: str, *, with_plain: bool = True
) -> tuple[list[Row], Rate, dict[str, list[Run]]]:
    """Every point by the engine in turn, and once, for its first trajectory, by the plain loop (if wanted)."""
    warm_up(pair, next(iter(points.values()))[1])
    before = bench.rate(pair.dtype)
    repetitions = min(bench.repetitions, 2)
    runs = bench.in_turn(
        {name: engine(pair, work) for name, (_, work) in points.items()}, title=title, repetitions=repetitions
    )
    loops = bench.in_turn(
        {name: plain(pair, work, first_trajectory) for name, (_, work) in points.items() if with_plain},
        title=f"{title}: plain loop",
        repetitions=1,
    )
    rate = before.max(bench.rate(pair.dtype))
    rows = [against_plain(runs[name], loops.get(name), rate, variant=name, x=x) for name, (x, _) in points.items()]
    return rows, rate, runs


def against_plain(runs: Sequence[Run], loop: Sequence[Run] | None, rate: Rate, **labels: Any) -> Row:
    """An engine row with the plain loop's rate, how many times it is, and the share of equal trajectories."""
    if loop is None:
        return row(runs, rate, **labels)
    return row(runs, rate, **labels) | {
        "plain_tokens_per_s": loop[0].tokens_per_s,
        "times_plain": ratio(loop, runs),
        "cpu_times_plain": cpu_ratio(loop, runs),
        "same_tokens": same_tokens(loop[0], runs[0]),
    }


def least(runs: Sequence[Run]) -> float:
    """The least wall time; busy neighbours only ever add."""
    return min((run.seconds for run in runs), default=math.inf)

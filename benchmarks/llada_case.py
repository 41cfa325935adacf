"""The case without guidance whose cost is the LM head: LLaDA's shape, with its vocabulary of 126,464."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.checkpoints import LLADA_126K
from benchmarks.harness import Bench, CaseResult, Figure, Row, counted, row, utilisation, warm_up
from benchmarks.machine import Rate, product_rate
from benchmarks.variants import engine, first_trajectory, plain
from benchmarks.workload import Pair, Run, Workload

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
SMALL = replace(LLADA, prompts=4, max_tokens=16, steps=8)
DTYPES = (torch.bfloat16, torch.float32)


def llada(bench: Bench) -> CaseResult:
    """Eight unguided requests on the LLaDA-shaped model, against the FLOP floor (LM head on masked rows only)."""
    work = bench.choose(LLADA, SMALL)
    rows: list[Row] = []
    figures: list[Figure] = []
    rates = []
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        pair = bench.llada(dtype)
        warm_up(pair, work)
        before, head_before = fastest(bench, dtype), head_rate(pair, work)
        runs = bench.in_turn({"engine": engine(pair, work)}, title=f"llada {name}")["engine"]
        loop = plain(pair, work, first_trajectory)(bench.first_set)
        rate, head = before.max(fastest(bench, dtype)), head_before.max(head_rate(pair, work))
        rates.append(rate.wall / 1e9)
        floor, shaped = floor_tokens_per_s(runs[0], rate), floor_tokens_per_s(runs[0], head)
        found = row(runs, rate, variant=f"{name}, {work.prompts} requests at once")
        found |= {"gemm_gflops": rate.wall / 1e9, "head_gflops": head.wall / 1e9}
        rows += [found | {"floor_tokens_per_s": floor}, row([loop], rate, variant=f"{name}, plain loop, one request")]
        figures += [
            Figure(f"llada: {name}, tokens/s", found["tokens_per_s"]),
            Figure(f"llada: {name}, floor in tokens/s at the best GEMM rate", floor),
            Figure(f"llada: {name}, floor in tokens/s at the rate of the head's own shape", shaped),
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


def head_rate(pair: Pair, work: Workload) -> Rate:
    """The same of the LM head's product, at the mean number of masked rows of a step."""
    masked = work.prompts * (work.max_tokens + 1) // 2
    product = (masked, LLADA_126K.hidden, pair.loaded.model.vocab_size)
    return product_rate(product, pair.dtype, pair.device).max(product_rate(product, torch.float32, pair.device))


def floor_tokens_per_s(run: Run, rate: Rate) -> float:
    """Tokens a second if the run's operations went at the measured rate and nothing else took time."""
    return run.tokens * rate.wall / counted(run).total

"""The engine against the plain loop on the same work, in one run: `python -m server.bench.offline`.

Every row is one workload; `x plain` compares its tokens/s with the plain per-request loop on the same kind of job,
`utilisation` is FLOPs counted from shapes over the machine's measured matrix-product rate. Ends with one JSON line.
By default it measures the generated random-weight pair (V = 16,384, 13 M and 5 M parameters) in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import kernels
from server.bench.checkpoints import write_pair
from server.bench.workload import Pair, Workload, count_flops, gemm_rate, load, run_engine, run_one_by_one, run_plain

HEADLINE = Workload()
SWEEPS: dict[str, list[Workload]] = {
    "headline": [HEADLINE],
    "concurrency": [replace(HEADLINE, prompts=n, best_of=1) for n in (1, 4, 16, 64)],
    "method": [replace(HEADLINE, method=m) for m in ("none", "bon", "expectation", "aps", "entrgi")],
    "trajectories": [replace(HEADLINE, best_of=k) for k in (1, 2, 4, 8)],
    "gradient_steps": [replace(HEADLINE, gradient_steps=m) for m in (1, 2, 3, 6)],
    "steps": [replace(HEADLINE, steps=t) for t in (8, 16, 32, 64, 128)],
    "max_tokens": [replace(HEADLINE, max_tokens=n, steps=n // 2) for n in (16, 32, 64, 128)],
    "prompt_words": [replace(HEADLINE, prompt_words=n) for n in (12, 50, 200)],
}


def measure(pair: Pair, workload: Workload, rate: float, *, plain_prompts: int) -> dict[str, Any]:
    """One row: the engine on the whole workload, one job at a time on all of it, the plain loop on a part of it."""
    jobs = workload.jobs(pair)
    run_engine(pair, jobs[:1])  # warm-up: lazy initialisation, allocator, caches
    together, results = run_engine(pair, jobs)
    apart, _ = run_one_by_one(pair, jobs)
    row: dict[str, Any] = asdict(workload) | {
        "seconds": together,
        "tokens_per_s": workload.tokens / together,
        "one_by_one_tokens_per_s": workload.tokens / apart,
        "utilisation": count_flops(pair, jobs) / together / rate,
    }
    if plain_prompts:
        sample = jobs[:plain_prompts]
        seconds, tokens = run_plain(pair, sample)
        per_job = workload.best_of * workload.max_tokens
        row["plain_tokens_per_s"] = per_job * len(sample) / seconds
        row["plain_seconds_for_all"] = seconds * len(jobs) / len(sample)
        row["x_plain"] = row["tokens_per_s"] / row["plain_tokens_per_s"]
        same = [
            list(trajectory.token_ids) == tokens[job.id][trajectory.index]
            for job in sample
            for trajectory in results[job.id].trajectories
        ]
        row["same_tokens_as_plain"] = sum(same) / len(same)
    return row


def rows(pair: Pair, sweeps: list[str], plain_prompts: int) -> Iterator[dict[str, Any]]:
    """All rows of the named sweeps, with a progress bar."""
    rate = gemm_rate(pair.loaded.model.dtype, pair.loaded.model.device)
    work = [(sweep, workload) for sweep in sweeps for workload in SWEEPS[sweep]]
    for sweep, workload in tqdm(work, desc="workloads"):
        yield {"sweep": sweep, "gemm_gflops": rate / 1e9} | measure(pair, workload, rate, plain_prompts=plain_prompts)


def show(results: list[dict[str, Any]]) -> None:
    """The table."""
    columns = ["sweep", "method", "prompts", "best_of", "max_tokens", "steps", "gradient_steps", "prompt_words"]
    figures = ["seconds", "tokens_per_s", "one_by_one_tokens_per_s", "plain_tokens_per_s", "x_plain", "utilisation"]
    table = Table(*columns, *figures)
    for row in results:
        numbers = [f"{row[name]:.3g}" if name in row else "-" for name in figures]
        table.add_row(*(str(row[name]) for name in columns), *numbers)
    Console(width=200).print(table)


def main() -> None:
    """Measure, print a table, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", nargs="+", choices=list(SWEEPS), default=["headline", "concurrency"])
    parser.add_argument("--dlm", type=Path, help="a diffusion checkpoint instead of the generated one")
    parser.add_argument("--rm", type=Path, help="its reward model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plain-prompts", type=int, default=1, help="jobs the plain loop runs (0: none)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        dlm, rm = (args.dlm, args.rm) if args.dlm else write_pair(Path(folder))
        pair = load(dlm, rm, getattr(torch, args.dtype), torch.device(args.device))
        results = list(rows(pair, args.sweep, args.plain_prompts))
    show(results)
    machine = {
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "kernels": kernels.backend_info(),
    }
    print(json.dumps({"bench": "offline", "dtype": args.dtype, "device": args.device} | machine | {"rows": results}))


if __name__ == "__main__":
    main()

"""The engine offline, against the plain loop on the same work in the same run: `python -m benchmarks.offline`.

Each case (`--case`) is one claim. Compared variants run in turn on request sets that they share. Utilisation is
operations counted from shapes over the machine's measured matrix-product rate. Prints tables and, last, one JSON line;
writes the same, and plots, to `--out`. By default it runs all cases in the quick form on the generated random-weight
pair (V = 16,384, 13 M and 5 M parameters) in float32; `--full` is the form that the claims are made in.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import cases, sweeps
from benchmarks.harness import Bench
from benchmarks.machine import describe
from benchmarks.plots import draw
from benchmarks.report import CaseResult, keep, show
from demo import bundled_model_path, bundled_reward_models

CASES: dict[str, Callable[[Bench], CaseResult]] = {
    case.__name__: case
    for case in (
        cases.headline,
        cases.unguided,
        cases.guided_over_unguided,
        cases.ablation,
        cases.exactness,
        sweeps.concurrency,
        sweeps.method,
        sweeps.linear,
        sweeps.prefix_share,
        cases.llada,
    )
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--case", nargs="+", choices=list(CASES), default=list(CASES), help="which cases to run; default: all"
    )
    size = made.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="smaller workloads, one repetition (the default)")
    size.add_argument("--full", action="store_true", help="the sizes that the claims are made for")
    made.add_argument("--repetitions", type=int, help="rounds of each comparison; default: 1, and 3 with --full")
    made.add_argument("--request-set", type=int, default=0, help="number of the first set of seeds and prompts")
    made.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    made.add_argument("--dlm", type=Path, help="a diffusion checkpoint instead of the generated one")
    made.add_argument("--rm", type=Path, help="its reward model")
    made.add_argument("--bundled", action="store_true", help="the bundled, trained pair instead of the generated one")
    made.add_argument("--dtype", default="float32", choices=["float64", "float32", "bfloat16", "float16"])
    made.add_argument("--device", default="cpu")
    made.add_argument("--out", type=Path, default=Path("build/bench"), help="for the JSON and the plots")
    return made


def main() -> None:
    """Measure, print tables, then one JSON line."""
    made = parser()
    args = made.parse_args()
    if (args.dlm is None) != (args.rm is None):
        made.error("--dlm and --rm go together")
    if args.bundled and args.dlm:
        made.error("--bundled names the checkpoints itself")
    if args.bundled:
        args.dlm, args.rm = bundled_model_path(), next(iter(bundled_reward_models().values()))
    if args.threads:
        torch.set_num_threads(args.threads)
    repetitions = args.repetitions or (3 if args.full else 1)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    console = Console(width=200)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), device, dtype, not args.full, repetitions, args.request_set, args.dlm, args.rm)
        document = {"bench": "offline", "form": "full" if args.full else "quick"} | describe(device, dtype)
        results = []
        for name in args.case:
            console.print(f"[bold]{name}[/]: {CASES[name].__doc__}")
            results.append(CASES[name](bench))
    show(results, console)
    whole = keep(document, results, args.out)
    for path in draw(whole, args.out):
        console.print(f"wrote {path}")
    print(json.dumps(whole))


if __name__ == "__main__":
    main()

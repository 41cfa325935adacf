"""What is known of the GPU path without a GPU, in one run: `make gpu-evidence`.

    python -m benchmarks.gpu.evidence [--quick] [--output build]

Runs with the CUDA build of torch and the triton that it pins: the kernels' ahead-of-time compilation, the guided step
of Dream-7B and a reward model of 1.7B on fake tensors of `cuda:0`, where devices and dtypes must fit, and on a
pretended GPU, where launches are counted and autograd runs; the host's time for a step; and FlashAttention's rounding.
What runs on Triton's interpreter, the engine by all methods among it, is in `make test-slow`. Prints tables, then one
JSON line, and writes it to gpu-evidence.json. Exit status 1 where something is not as it must be.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from rich.console import Console

from benchmarks.gpu.counts import LIMITS, count, jobs, pretended
from benchmarks.gpu.rounding import differences
from benchmarks.report import Row, show, table
from server.wire.messages import Failed

STEPS = 3


def fits(layers: int | None) -> list[str]:
    """What fails in some guided steps on fake tensors of a GPU: a tensor on the wrong device, a dtype that an operator
    does not take, a value that the host would have to wait for."""
    with pretended(layers, fake=True) as setup:
        for job in jobs(setup, 4):
            setup.runner.add(job, now=0.0)
        events = [event for _ in range(STEPS) for event in setup.runner.step()]
    return [event.message for event in events if isinstance(event, Failed)]


def host_milliseconds(layers: int | None) -> float:
    """Of the engine's thread, for one guided step of four trajectories in which graphs cost nothing. What pretends the
    GPU is part of it, so the engine takes less."""
    with pretended(layers, counts=False) as setup:
        for job in jobs(setup, 4):
            setup.runner.add(job, now=0.0)
        seconds = []
        for _ in range(4 + 2 * STEPS):
            started = time.thread_time()
            setup.runner.step()
            seconds.append(time.thread_time() - started)
    return 1e3 * median(seconds[4:])


def main(arguments: list[str] | None = None) -> int:
    """The program; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two layers a model, and a subset of the kernels")
    parser.add_argument("--output", type=Path, default=Path("build"))
    options = parser.parse_args(arguments)
    if torch.version.cuda is None:
        print("this torch is a build for CPUs; name an interpreter with its CUDA build (CUDA_PY=...)", file=sys.stderr)
        return 2
    console, layers = Console(width=120, highlight=False), 2 if options.quick else None
    wrong: list[str] = []
    command = [sys.executable, "-m", "benchmarks.kernels.aot", *(["--quick"] if options.quick else [])]
    if subprocess.run(command, check=False).returncode:
        wrong.append("ahead-of-time compilation")
    wrong += [f"on fake tensors: {message}" for message in fits(layers)]
    results, found = [], dict[str, Row]()
    for name, trajectories, graphs in (("4", 4, True), ("16", 16, True), ("4 without graphs", 4, False)):
        result, found[name] = count(trajectories, graphs=graphs, layers=layers)
        results.append(result)
    for name, limit in LIMITS.items():
        if (value := found["4"][name]) > limit:
            wrong.append(f"{name}: {value}, past {limit}")
    show(results, console)
    rounding = differences()
    console.print(table("FlashAttention's rounding on the trial run of kernels.varlen", rounding))
    wrong += [f"rounding at {row['head size']} channels" for row in rounding if row["worst"] > row["tolerance"]]
    milliseconds = host_milliseconds(layers)
    console.print(f"host, a step of 4 trajectories without the graphs' replay: {milliseconds:.1f} ms at most")
    console.print(*(f"[red]wrong[/]: {each}" for each in wrong), sep="\n")
    counts = {name: value for name, value in found["4"].items() if name in (*LIMITS, "triton_variants")}
    whole = {**counts, "host_milliseconds": milliseconds, "torch": torch.__version__, "cases": found, "wrong": wrong}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "gpu-evidence.json").write_text(json.dumps(whole, indent=1) + "\n")
    print(json.dumps({name: value for name, value in whole.items() if name != "cases"}))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

"""What the engine's own Python costs: `python -m benchmarks.host_time [DIR ...]` for this checkout, and for others.

The bundled pair is small, so a step of it is little more than what the host does around its arithmetic; the same Python
runs beside a GPU. Counted are the interpreter's calls, of functions in Python and of built-in ones (`call` and
`c_call` of `sys.setprofile`), in one step of the runner, with one request of K trajectories, guided with M = 3 and
unguided; timed, in other runs, is the CPU time of its one thread. Both are medians over the steps of a run, of which
the first also runs the conversation and the last also scores; of the times the least of some runs is taken.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.compare import checkout
from benchmarks.processes import ROOT
from demo import bundled_model_path, bundled_reward_models

DRIVER = """
import importlib, json, pathlib, statistics, sys, time
import torch
torch.set_num_threads(int(sys.argv[3]))
name = "benchmarks.workload" if pathlib.Path("benchmarks").is_dir() else "server.bench.workload"
workload = importlib.import_module(name)
pair = workload.load(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), torch.float32, torch.device("cpu"))
step, seen = workload.Runner.step, []

def counted(runner):
    calls = 0
    def note(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")
    sys.setprofile(note)
    try:
        return step(runner)
    finally:
        sys.setprofile(None)
        seen.append(calls)

def timed(runner):
    started = time.thread_time()
    try:
        return step(runner)
    finally:
        seen.append(1000 * (time.thread_time() - started))

def median(way, asked):
    workload.Runner.step = way
    seen.clear()
    workload.run_engine(pair, workload.Workload(**asked).jobs(pair))
    return statistics.median(seen)

for line in sys.stdin:
    asked = json.loads(line)
    runs = asked.pop("runs")
    times = [median(timed, asked) for _ in range(runs + 1)][1:]
    print(json.dumps({"python_calls": median(counted, asked), "ms": round(min(times), 2)}), flush=True)
"""
"""What runs in each checkout's own process, with that checkout's modules."""


def main() -> None:
    """Measure, print a table, then one JSON line: the calls and milliseconds of the guided step of one trajectory, and
    all rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("others", type=Path, nargs="*", metavar="DIR", help="another checkout's root")
    parser.add_argument("--runs", type=int, default=3, help="of each case, after one that is thrown away")
    parser.add_argument("--best-of", type=int, nargs="+", default=[1, 4, 16], help="K, trajectories of the request")
    given = parser.parse_args()
    models = bundled_model_path(), next(iter(bundled_reward_models().values()))
    rows: list[dict[str, Any]] = []
    for folder in (ROOT, *(each.resolve() for each in given.others)):
        with checkout(folder, *models, threads=1, driver=DRIVER) as engine:
            for method in ("entrgi", "none"):
                for count in given.best_of:
                    asked = {"method": method, "prompts": 1, "best_of": count, "runs": given.runs}
                    case = {"checkout": str(folder), "method": method, "best_of": count}
                    rows.append(case | engine.ask(asked))
    table = Table(*rows[0], title="A step of the bundled pair", title_justify="left")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=120, highlight=False).print(table)
    headline = {key: rows[0][key] for key in ("python_calls", "ms")}
    print(json.dumps({"bench": "host_time"} | headline | {"rows": rows}))


if __name__ == "__main__":
    main()

"""This checkout against another one, in pairs: `python -m benchmarks.compare DIR`.

Both run the headline workload on the same generated pair, each in a process of its own that loads the models once; of
every pair one goes first, by turns, and both get the same request set. Reported is how many times the other checkout's
time this one takes, the median over the pairs and the least of each, and the share of trajectories whose tokens agree.
`--prompts` names several sizes; DIR may be a checkout from before the benchmarks had a folder of their own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from benchmarks.checkpoints import write_pair
from benchmarks.processes import ROOT
from demo import bundled_model_path, bundled_reward_models

DRIVER = """
import importlib, json, pathlib, sys
import torch
torch.set_num_threads(int(sys.argv[3]))
name = "benchmarks.workload" if pathlib.Path("benchmarks").is_dir() else "server.bench.workload"
workload = importlib.import_module(name)
pair = workload.load(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), torch.float32, torch.device("cpu"))
for line in sys.stdin:
    asked = json.loads(line)
    number = asked.pop("set")
    run = workload.run_engine(pair, workload.Workload(**asked).jobs(pair, number))
    print(json.dumps({"seconds": run.seconds, "cpu": run.cpu_seconds, "tokens": run.token_ids}), flush=True)
"""
"""What runs in each checkout's own process, with that checkout's modules."""


@dataclass(frozen=True, slots=True)
class Checkout:
    """An engine of one checkout that answers questions."""

    process: subprocess.Popen[str]

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Run the workload that `question` describes. RuntimeError when the process has ended."""
        if self.process.stdin is None or self.process.stdout is None:
            raise RuntimeError("the engine's process has no pipes")
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"an engine ended with status {self.process.wait()}")
        return dict(json.loads(line))


@contextmanager
def checkout(folder: Path, dlm: Path, rm: Path, threads: int, driver: str = DRIVER) -> Iterator[Checkout]:
    """Start the engine of the checkout in `folder`, and end it by closing its input."""
    command = [sys.executable, "-c", driver, str(dlm), str(rm), str(threads)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=folder, text=True, **pipes) as process:
        yield Checkout(process)


def compared(name: str, pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """The row of one workload: (this one's answer, the other's) by pair."""
    trajectories = [
        mine == theirs
        for a, b in pairs
        for job in a["tokens"]
        for mine, theirs in zip(a["tokens"][job], b["tokens"][job], strict=True)
    ]
    return {
        "workload": name,
        "pairs": len(pairs),
        "times_the_other": round(median(a["seconds"] / b["seconds"] for a, b in pairs), 4),
        "times_by_cpu": round(median(a["cpu"] / b["cpu"] for a, b in pairs), 4),
        "seconds": round(min(a["seconds"] for a, _ in pairs), 3),
        "seconds_of_the_other": round(min(b["seconds"] for _, b in pairs), 3),
        "same_tokens": sum(trajectories) / len(trajectories),
    }


def main() -> None:
    """Measure, print one line a workload, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, metavar="DIR", help="the other checkout's root")
    parser.add_argument("--pairs", type=int, default=3, help="of each workload, after one that is thrown away")
    parser.add_argument("--prompts", type=int, nargs="+", default=[4, 16], help="requests at once")
    parser.add_argument("--best-of", type=int, default=4, help="trajectories of each request")
    parser.add_argument("--steps", type=int, default=32, help="denoising steps, of 64 tokens")
    parser.add_argument("--method", default="entrgi")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bundled", action="store_true", help="the bundled, trained pair instead of the generated one")
    given = parser.parse_args()
    work = {"method": given.method, "best_of": given.best_of, "steps": given.steps}
    rows = []
    with ExitStack() as stack:
        if given.bundled:
            models = bundled_model_path(), next(iter(bundled_reward_models().values()))
        else:
            models = write_pair(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        both = [stack.enter_context(checkout(each, *models, given.threads)) for each in (ROOT, given.other.resolve())]
        for prompts in given.prompts:
            pairs = []
            for number in tqdm(range(given.pairs + 1), desc=f"{prompts} requests", leave=False):
                asked = work | {"prompts": prompts, "set": number}
                answers = {each: both[each].ask(asked) for each in ((0, 1) if number % 2 else (1, 0))}
                pairs.append((answers[0], answers[1]))
            rows.append(compared(f"{given.method}, {prompts} requests of K = {given.best_of}", pairs[1:]))
            print(*(f"{key}: {value}" for key, value in rows[-1].items()), sep="  ")
    print(json.dumps({"bench": "compare", "rows": rows}))


if __name__ == "__main__":
    main()

"""How heavy the house is: `python -m benchmarks.measures` prints a table and then one JSON line.

Lines are those of files that git knows, comments and blank ones included. Frames and reading are counted while one
guided step of the bundled pair runs: how many functions stand on the stack from `Runner.step` to an operation of
`kernels` (both included), and how long the files are through which the step runs. The bound on those leaves out the
networks and the kernels, which `guidance/plain`, the same step in one file, takes as given too. With `--check` a
measure past its bound ends the program with status 1.

The bounds are those of the redesign (16,000 lines of serving code, 17,000 of tests, a median of 120, 40 settings, 2,400
lines of a step) and what was added since, in lines of serving code and of tests: converted models and chat templates
220 and 280, block-causal decoding 390 and 380, LoRA adapters 670 and 710, /v1/responses 370 and 190, ids, failures and
overload 360 and 390, what an answer tells of its cost 100 and 90, descriptions of all fields 220 and 20, the command
line as a wheel 0 and 140, what a machine lacks and how work is done on it (the doctor) 260 and 140, programs for GPUs 0
and 140, comparing, sampling and batches from the command line 0 and 1,160, files and batches 1,120 and 570, frozen
networks without modules, uploads in one copy and joint prefills 470 and 90 (200 of a step), a GPU's passes of decoder
blocks and graphs that are on where they can be 420 and 190, a playground to compare on 50 and 270, fused kernels, their
choice and warm-up, and a search in few passes 660 and 220 (10), two devices at once, and what goes wrong while passes
are prepared, 30 and 40, resampling 760 and 970 (240), outside scorers 850 and 1,480, classifiers with labels and
encoders 550 and 640, Ray Serve, Kubernetes, a proxy and a simulation, which are no serving code, 20 and 1,010. Of this
90 and 430 were taken out again that a reading of the whole found to be said twice. Fifteen settings came with them:
five of adapters, two of attention, two of keys, one of /docs, three of batches, one of kernels, one of scorers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from types import CodeType, FrameType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.workload import Workload, engine_runner, load
from demo import bundled_model_path, bundled_reward_models
from server.settings import SETTINGS

ROOT = Path(__file__).resolve().parent.parent
SERVING = ("server", "kernels")
CODE = (".py", ".h", ".cpp")
NETWORKS = ("server/models/", "server/rewards/")
OPERATIONS = frozenset({"begin", "draw", "filtered_stats", "mix_into", "update"})
"""What the worker asks of `kernels` for the rows of a step; conversions and random keys are not operations."""


@dataclass(frozen=True, slots=True)
class Measure:
    """One number, and the most that it may be where there is such a bound."""

    name: str
    value: float
    at_most: float | None = None

    @property
    def met(self) -> bool:
        """Whether the bound, if there is one, is kept."""
        return self.at_most is None or self.value <= self.at_most


def lines_of(*folders: str) -> dict[str, int]:
    """Lines by path of every file of code in these folders that git knows."""
    listed = subprocess.run(["git", "ls-files", "-z", *folders], cwd=ROOT, capture_output=True, text=True, check=True)
    paths = [path for path in listed.stdout.split("\0") if path.endswith(CODE) and (ROOT / path).is_file()]
    return {path: len((ROOT / path).read_text("utf-8").splitlines()) for path in paths}


class Followed:
    """What was called under `Runner.step`: the functions of the house, and the longest ways into `kernels`."""

    def __init__(self) -> None:
        self.functions: set[CodeType] = set()
        self.to_operation: list[str] = []  # the house's frames from Runner.step to an operation of kernels
        self.inside: list[str] = []  # the same to the deepest function of kernels, whatever it is

    @property
    def files(self) -> set[str]:
        """Paths of the files that these functions stand in, from the root."""
        return {_path(code) for code in self.functions}

    @property
    def function_lines(self) -> int:
        """Lines of these functions; one that stands within another is counted once."""
        lines = {(code.co_filename, line) for code in self.functions for line in _span(code)}
        return len(lines)

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """What `sys.setprofile` calls at every call and return."""
        if event != "call" or not _path(frame.f_code).startswith(SERVING):
            return
        self.functions.add(frame.f_code)
        if _path(frame.f_code).startswith("kernels"):
            stack = _stack(frame)
            self.inside = max(self.inside, stack, key=len)
            if frame.f_code.co_name in OPERATIONS and not stack[-2].startswith("kernels"):
                self.to_operation = max(self.to_operation, stack, key=len)

    @contextmanager
    def following(self) -> Iterator[None]:
        """Follow what this thread calls meanwhile."""
        sys.setprofile(self)
        try:
            yield
        finally:
            sys.setprofile(None)


def _path(code: CodeType) -> str:
    return code.co_filename.removeprefix(f"{ROOT}/")


def _span(code: CodeType) -> range:
    lines = [line for _, _, line in code.co_lines() if line]
    return range(code.co_firstlineno, max(lines, default=code.co_firstlineno) + 1)


def _stack(frame: FrameType | None) -> list[str]:
    """The house's frames from the outermost one to this one, as `path:function`."""
    names = []
    while frame is not None:
        if _path(frame.f_code).startswith(SERVING):
            names.append(f"{_path(frame.f_code)}:{frame.f_code.co_qualname}")
        frame = frame.f_back
    return names[::-1]


def follow_a_guided_step() -> Followed:
    """The second step of one guided request of two trajectories on the bundled pair: the first has filled caches."""
    rewards = bundled_reward_models()
    pair = load(bundled_model_path(), next(iter(rewards.values())), torch.float32, torch.device("cpu"))
    runner = engine_runner(pair)
    for job in Workload(prompts=1, best_of=2, max_tokens=16, steps=8).jobs(pair):
        runner.add(job, now=0.0)
    runner.step()
    followed = Followed()
    with followed.following():
        runner.step()
    if not followed.to_operation:
        raise RuntimeError(
            f"the step called none of {sorted(OPERATIONS)}: are the operations of kernels called so still?"
        )
    return followed


def measures(followed: Followed) -> list[Measure]:
    """All measures, in the order of the table."""
    serving, tests = lines_of(*SERVING), lines_of("tests")
    files = lines_of(*SERVING, "clients", "benchmarks", "demo", "tests")
    read = {path: serving[path] for path in followed.files}
    step = {path: lines for path, lines in read.items() if not path.startswith((*NETWORKS, "kernels/"))}
    return [
        Measure("lines of serving code", sum(serving.values()), 23_495),
        Measure("lines of tests", sum(tests.values()), 25_940),
        Measure("lines of clients, benchmarks and demo", sum(lines_of("clients", "benchmarks", "demo").values())),
        Measure("lines of the longest file", max(files.values()), 400),
        Measure("lines of serving code's median file", median(serving.values()), 130),
        Measure("files of serving code", len(serving)),
        Measure("settings", len(SETTINGS), 55),
        Measure("frames from Runner.step to an operation of kernels", len(followed.to_operation), 9),
        Measure("frames from Runner.step to the deepest function of kernels", len(followed.inside)),
        Measure("files that a guided step runs through, without networks and kernels", len(step)),
        Measure("lines of these files", sum(step.values()), 3_150),
        Measure("files that a guided step runs through, with both", len(read)),
        Measure("lines of all these files", sum(read.values())),
        Measure("lines of the functions that run in them", followed.function_lines),
    ]


def show(found: list[Measure], followed: Followed, console: Console) -> None:
    """The table, the longest ways into kernels, and the longest files."""
    table = Table("measure", "value", "at most", "", title="Measures", title_justify="left")
    for each in found:
        bound = "" if each.at_most is None else f"{each.at_most:,.0f}"
        table.add_row(each.name, f"{each.value:,.0f}", bound, "" if each.met else "[red]past it[/]")
    console.print(table)
    for title, stack in (("to an operation", followed.to_operation), ("into kernels", followed.inside)):
        console.print(f"the longest way {title}:", *(f"  {name}" for name in stack), sep="\n", markup=False)
    counts = lines_of(*SERVING, "clients", "benchmarks", "demo", "tests")
    for path in sorted(counts, key=lambda path: -counts[path])[:5]:
        console.print(f"{counts[path]:5} {path}", markup=False)


def main() -> int:
    """Measure, print, and hold the bounds where that is asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.measures", description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail when a measure is past its bound")
    given = parser.parse_args()
    followed = follow_a_guided_step()
    found = measures(followed)
    show(found, followed, Console(width=120, highlight=False))
    print(json.dumps([asdict(each) for each in found]))
    return int(given.check and not all(each.met for each in found))


if __name__ == "__main__":
    raise SystemExit(main())

"""One command for a machine with a GPU: does everything give the right results there, and how fast is it?

    python -m benchmarks.gpu.check [--minutes 30] [--output build] [--only PART ...]

Each part runs in a process of its own, whatever became of those before it; the most worthwhile come first, and a part
that does not fit into the minutes that are left is left out. A part whose packages are missing says so, and nothing
needs a network. Writes gpu-check.md and gpu-check.json into the output folder. Exit status 1 where a result is wrong,
2 without a GPU.

With `--device cpu --size tiny` the same program runs on any machine, on models of no use: then only the device itself
is untested.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import signal
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.part import Given, Part, Report, run_here

PARTS = (
    Part("device", "doctor", 0.3, "The machine, and what is in the way"),
    Part("golden", "correct", 0.7, "The authors' recorded runs, on the device"),
    Part("plain", "correct", 0.7, "The engine and the plain loop"),
    Part("step", "speed", 2.5, "Guided steps at real size"),
    Part("kernels", "kernels", 1.5, "The passes over the vocabulary"),
    Part("http", "correct", 1.0, "A request over HTTP"),
    Part("tests", "correct", 4.0, "The tests that need a device"),
    Part("waits", "speed", 0.5, "Where the host waits"),
    Part("passes", "speed", 0.7, "A reward model's passes, as graphs and not"),
    Part("trunk", "speed", 2.0, "The diffusion model's blocks, in every way"),
)


PRELOADED = ["benchmarks.gpu.correct", "benchmarks.gpu.speed"]
"""Imported once for all parts, where their packages are there; nothing of it touches a device."""


def run(part: Part, given: Given) -> Report:
    """A part in a process of its own, which a lost device ends with it; what it has started is ended, too."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=run_here, args=(part, given, sending))
    process.start()
    assert process.pid is not None
    sending.close()
    report: Report
    try:
        report = receiving.recv() if receiving.poll(given.seconds) else {"left_out": f"cut off: {given.seconds:.0f} s"}
    except EOFError:
        process.join()
        report = {"wrong": [f"its process ended with status {process.exitcode}"]}
    finally:
        process.kill()  # which leads no group before it has begun
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
    return report


def markdown(document: Report) -> str:
    """The report as a page."""
    about = ", ".join(f"{key} {value}" for key, value in document["about"].items())
    lines = ["# GPU check", "", about, "", "| part | result | seconds |", "|---|---|---|"]
    for name, report in document["parts"].items():
        lines.append(f"| {name} | {result(report)} | {report.get('seconds', '')} |")
    for part in PARTS:
        report = document["parts"].get(part.name, {})
        if report.keys() & {"tables", "text", "wrong"}:
            lines += ["", f"## {part.title}"]
        lines += [f"\n**Wrong:** {each}" for each in report.get("wrong", ())]
        for title, rows in report.get("tables", {}).items():
            lines += ["", title, "", *_table(rows)]
        if "text" in report:
            lines += ["", "```", report["text"], "```"]
    return "\n".join(lines) + "\n"


def result(report: Report) -> str:
    """In a few words."""
    return f"left out: {report['left_out']}" if "left_out" in report else "WRONG" if report.get("wrong") else "ok"


def _table(rows: list[Report]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return lines + [f"| {' | '.join(_cell(row.get(column, '')) for column in columns)} |" for row in rows]


def _cell(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def main(arguments: list[str] | None = None) -> int:
    """The program; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--output", type=Path, default=Path("build"))
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=["full", "tiny"], default="full")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA device here (`make doctor` says why): nothing was checked", file=sys.stderr)
        return 2
    until = time.monotonic() + 60 * options.minutes
    about = {
        "on": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "a CPU",
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "size": options.size,
    }
    document: Report = {"about": about, "parts": {}}
    options.output.mkdir(parents=True, exist_ok=True)
    given = Given(device, options.size == "tiny", 0.0)
    for part in PARTS:
        if options.only and part.name not in options.only:
            continue
        left, started = until - time.monotonic(), time.monotonic()
        report: Report = {"left_out": "no time"}
        if left > 60 * part.minutes or given.tiny:
            report = run(part, replace(given, seconds=min(left, 180 * part.minutes)))
        report["seconds"] = round(time.monotonic() - started, 1)
        document["parts"][part.name] = report
        print(f"{part.name}: {result(report)} ({report['seconds']} s)", flush=True)
        # After each part, for somebody may have no more time.
        (options.output / "gpu-check.json").write_text(json.dumps(document, indent=1) + "\n")
        (options.output / "gpu-check.md").write_text(markdown(document))
    print(f"wrote {options.output / 'gpu-check.md'} and {options.output / 'gpu-check.json'}")
    return int(any(report.get("wrong") for report in document["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())

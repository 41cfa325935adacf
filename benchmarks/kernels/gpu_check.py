"""One command for a machine with a GPU: every kernel test on the device, then the benchmark, then a report.

    python -m benchmarks.kernels.gpu_check [--output build] [--skip-tests]

Writes gpu-report.json and gpu-report.md into the output folder. Exit status 2 without a CUDA device, 1 when a test
fails.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.__main__ import report
from benchmarks.kernels.compare import Shape

SHAPES = (
    (128, 126_464, 1024),  # one trajectory of LLaDA
    (512, 151_936, 1024),
    (2048, 151_936, 1024),
    (2048, 152_064, 2048),  # Dream, sixteen trajectories, a reward model of 2048
)


def run_tests() -> tuple[int, str]:
    """Kernel tests marked `gpu`; exit status and the last lines."""
    command = [sys.executable, "-m", "pytest", "tests/kernel_ops", "-m", "gpu", "-q", "--timeout", "600"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.returncode, "\n".join((result.stdout + result.stderr).strip().splitlines()[-15:])


def markdown(tests: str, reports: list[dict[str, Any]]) -> str:
    """The report as a page."""
    lines = ["# Kernels on a GPU", "", f"{torch.cuda.get_device_name()}, torch {torch.__version__}", ""]
    lines += ["```", tests, "```", "", "| shape | implementation | step ms | of the product limit | peak tensors |"]
    lines += ["|---|---|---|---|---|"]
    for entry in reports:
        shape = " ".join(f"{k}={v}" for k, v in entry["shape"].items())
        for result in entry["results"]:
            milliseconds = result["seconds"]["step"] * 1e3
            share, peak = result["product_share_of_step"], result["peak_tensors"]
            lines.append(f"| {shape} | {result['implementation']} | {milliseconds:.2f} | {share:.0%} | {peak:.2f} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """The program; returns its exit status."""
    parser = argparse.ArgumentParser(description="Test and measure the kernels on this machine's GPU.")
    parser.add_argument("--output", type=Path, default=Path("build"))
    parser.add_argument("--skip-tests", action="store_true")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was checked", file=sys.stderr)
        return 2
    status, tests = (0, "skipped") if options.skip_tests else run_tests()
    print(tests)
    device = torch.device("cuda")
    reports = [
        report(Shape(n, v, d, 3, torch.bfloat16, device), ["triton", "torch"], 10, research=n <= 512)
        for n, v, d in SHAPES
    ]
    options.output.mkdir(parents=True, exist_ok=True)
    summary = {"device": torch.cuda.get_device_name(), "tests_exit_status": status, "tests": tests, "reports": reports}
    (options.output / "gpu-report.json").write_text(json.dumps(summary, indent=2) + "\n")
    (options.output / "gpu-report.md").write_text(markdown(tests, reports))
    print(f"wrote {options.output / 'gpu-report.json'} and {options.output / 'gpu-report.md'}")
    return 1 if status else 0


if __name__ == "__main__":
    sys.exit(main())

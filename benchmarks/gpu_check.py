"""On a GPU: the device tests, then the diffusion trunk in every way that it can be run, a reward model's passes in
graphs and without, and the waits of a step.

    python -m benchmarks.gpu_check [--output build] [--skip-tests] [--layers 28]

Prints a table and one JSON line and writes both to the output folder (device-report.md, device-report.json). Exit
status 2 without a CUDA device, 1 when a test fails. Weights are random, of Dream-7B's shape where they fit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.reward_passes import Setup, measure_passes
from benchmarks.workload import Workload, engine_runner, load, run_to_end
from demo import bundled_model_path, bundled_reward_models
from demo.train_dlm import initialise
from server.errors import ConfigurationError
from server.models.acceleration import accelerate, choose_attention
from server.models.dream import DreamModel
from server.models.layers import DecoderConfig
from server.models.packing import PackedLayout
from server.rewards.graphs import graph_passes

TESTS = ("tests", "--ignore", "tests/kernel_ops")  # benchmarks.kernels.gpu_check runs those
BATCHES = {"1 x 228": [228], "4 x 200-260": [200, 220, 240, 260], "16 x 180-270": [180 + 6 * i for i in range(16)]}
MASKED = 128
"""How many rows of each sequence are masked."""

WAYS = {
    "plain, sdpa": ("sdpa", False, False),
    "plain, varlen": ("varlen", False, False),
    "compile": ("auto", True, False),
    "graphs": ("auto", False, True),
    "compile + graphs": ("auto", True, True),
}
GIBIBYTE = 1 << 30
REPEATS = 20


def run_tests() -> tuple[int, str]:
    """The tests marked `gpu`; exit status and the last lines."""
    command = [sys.executable, "-m", "pytest", *TESTS, "-m", "gpu", "-q", "--timeout", "900"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.returncode, "\n".join((result.stdout + result.stderr).strip().splitlines()[-15:])


def shape(layers: int) -> DecoderConfig:
    """Dream-7B with so many layers and a small vocabulary: the head is not measured here."""
    return DecoderConfig(
        hidden=3584, intermediate=18944, heads=28, key_heads=4, head_size=128, layers=layers,
        vocab_size=1024, mask_token_id=0,
    )  # fmt: skip


def fitting_layers(wanted: int, device: torch.device) -> int:
    """At most `wanted`; half of the free memory is for the weights (0.47 GB a layer in bfloat16)."""
    free = torch.cuda.mem_get_info(device)[0]
    return max(2, min(wanted, int(free / 2 / (0.47 * GIBIBYTE))))


def build(config: DecoderConfig, device: torch.device) -> DreamModel:
    """Random weights in bfloat16, made on the device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = DreamModel(config)
    finally:
        torch.set_default_dtype(before)
    initialise(model, seed=0)
    return model.requires_grad_(False).eval()


@torch.no_grad()
def milliseconds(model: DreamModel, lengths: list[int], device: torch.device) -> float:
    """A forward's time as the caller sees it, packing included: the best of some."""
    tokens = torch.randint(0, model.vocab_size, (sum(lengths),), device=device)
    starts = torch.tensor([sum(lengths[:i]) for i in range(len(lengths))])
    rows = (starts[:, None] + torch.arange(MASKED)).flatten().to(device)
    best = float("inf")
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        begin.record()
        model.hidden(tokens, PackedLayout.of(lengths, device), rows)
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end))
    return best


def measure(model: DreamModel, device: torch.device) -> list[dict[str, Any]]:
    """The time of every way on every batch; a way that cannot run says why."""
    results: list[dict[str, Any]] = []
    for name, (attention, compiled, graphs) in WAYS.items():
        model.trunk = model.plain_trunk
        try:
            accelerate(model, 2048, attention, compiled=compiled, graphs=graphs)
        except ConfigurationError as error:
            results.append({"way": name, "unavailable": str(error)})
            continue
        times = {batch: round(milliseconds(model, lengths, device), 3) for batch, lengths in BATCHES.items()}
        results.append({"way": name, "attention": model.model.attention_backend, "milliseconds": times})
    return results


def waits(device: torch.device) -> dict[str, Any]:
    """How often the host waits for the device in a job of the bundled models, and where, by torch's own report."""
    rewards = bundled_reward_models()
    pair = load(bundled_model_path(), next(iter(rewards.values())), torch.bfloat16, device)
    runner = engine_runner(pair)
    found: dict[str, Any] = {}
    for name in ("unguided", "guided"):
        work = Workload(method="none" if name == "unguided" else "entrgi", prompts=1, max_tokens=32, steps=32)
        run_to_end(runner, work.jobs(pair))  # what is made on first use
        before = runner.stats.denoising_steps
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                run_to_end(runner, work.jobs(pair, 1))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        steps = runner.stats.denoising_steps - before
        at = [f"{Path(each.filename).name}:{each.lineno}" for each in caught if "synchroniz" in str(each.message)]
        found[name] = {"steps": steps, "waits": len(at), "places": dict(Counter(at))}
    return found


def passes(device: torch.device) -> dict[str, Any]:
    """A reward model's passes with `cuda_graphs` and without, or why there are none."""
    setup = Setup()
    try:
        heads = setup.reward.hidden // setup.reward.heads
        backend = choose_attention("auto", device, getattr(torch, setup.dtype), heads)
        return {"attention": backend, "rows": measure_passes(device, setup, graph_passes, backend)}
    except ConfigurationError as error:
        return {"unavailable": str(error)}


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    lines = ["# Devices", "", f"{report['device']}, torch {report['torch']}, {report['layers']} layers of Dream-7B", ""]
    lines += ["```", report["tests"], "```", "", f"| way | attention | {' | '.join(BATCHES)} |"]
    lines.append("|---|---|" + "---|" * len(BATCHES))
    for entry in report["trunk"]:
        if "unavailable" in entry:
            lines.append(f"| {entry['way']} | {entry['unavailable']} |" + " |" * len(BATCHES))
        else:
            times = " | ".join(f"{value:.2f} ms" for value in entry["milliseconds"].values())
            lines.append(f"| {entry['way']} | {entry['attention']} | {times} |")
    if "unavailable" in report["passes"]:
        lines += ["", f"`cuda_graphs`: {report['passes']['unavailable']}"]
    else:
        lines += ["", "| rows of a reward pass | kernel by kernel | graphs | gain |", "|---|---|---|---|"]
        for entry in report["passes"]["rows"]:
            lines.append(f"| {entry['rows']} | {entry['kernels']} ms | {entry['graphs']} ms | {entry['gain']} |")
    for method, entry in report["waits"].items():
        lines += [
            "",
            f"`{method}`: the host waited {entry['waits']} times in {entry['steps']} steps: {entry['places']}",
        ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """The program; returns its exit status."""
    parser = argparse.ArgumentParser(description="Test and measure what runs the models on this machine's GPU.")
    parser.add_argument("--output", type=Path, default=Path("build"))
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--layers", type=int, default=28, help="of Dream-7B; fewer are taken where they do not fit")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was checked", file=sys.stderr)
        return 2
    status, tests = (0, "skipped") if options.skip_tests else run_tests()
    device = torch.device("cuda", torch.cuda.current_device())
    layers = fitting_layers(options.layers, device)
    report = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "layers": layers,
        "tests_exit_status": status,
        "tests": tests,
        "trunk": measure(build(shape(layers), device), device),
        "passes": passes(device),
        "waits": waits(device),
    }
    page = markdown(report)
    print(page)
    print(json.dumps(report))
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "device-report.json").write_text(json.dumps(report, indent=2) + "\n")
    (options.output / "device-report.md").write_text(page)
    return 1 if status else 0


if __name__ == "__main__":
    sys.exit(main())

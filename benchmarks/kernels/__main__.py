"""python -m benchmarks.kernels: prints a table, then one JSON line.

python -m benchmarks.kernels                                              # N=128 V=32768 D=256 M=3 float32
python -m benchmarks.kernels --vocab 151936 --hidden 1024 --repeats 2
python -m benchmarks.kernels --device cuda --dtype bfloat16 --rows 2048 --vocab 151936 --hidden 2048
python -m benchmarks.kernels --device cuda --backends fused triton        # products in our kernels, or the library's
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from typing import Any

import torch

import kernels
from benchmarks.kernels import compare, measure

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def device_name(device: torch.device) -> str:
    """A GPU's name, or the processor's and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as file:
            model = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {torch.get_num_threads()} threads"


def report(shape: compare.Shape, backends: list[str], repeats: int, research: bool) -> dict[str, Any]:
    """Runs the comparison and prints its table."""
    problem = compare.Problem(shape)
    copy = measure.copy_bytes_per_second(problem.logits, max(repeats, 3))
    forward, backward = measure.product_flops_per_second(shape.rows, problem.table, max(repeats, 3))
    results = [compare.measure_backend(problem, backend, repeats) for backend in backends]
    if research:
        results.insert(0, compare.measure_research(problem, repeats))
    tensor_bytes = shape.rows * shape.vocab_size * 4
    moved = compare.bytes_moved(shape)
    flops = 2.0 * shape.rows * shape.vocab_size * shape.hidden
    floor = {"mix": flops / forward, "update": flops / backward}
    floor["step"] = shape.gradient_steps * (floor["mix"] + floor["update"])

    dtype = str(shape.dtype).removeprefix("torch.")
    print(f"N={shape.rows} V={shape.vocab_size} D={shape.hidden} M={shape.gradient_steps} {dtype}", end="; ")
    print(f"{device_name(shape.device)}; load average {os.getloadavg()[0]:.1f}")
    print(f"limits: copy {copy / 1e9:.1f} GB/s, products {forward / 1e9:.0f} and {backward / 1e9:.0f} GFLOP/s")
    columns = "{:<14} {:<16} {:>10} {:>8} {:>10} {:>8} {:>9}"
    print(columns.format("operation", "implementation", "ms", "speed-up", "bytes", "of copy", "of product"))
    for operation in compare.OPERATIONS:
        for result in results:
            s = result.seconds[operation]
            first = results[0].seconds[operation]
            ours = result.name != "research code"
            print(
                columns.format(
                    operation,
                    result.name,
                    f"{s * 1e3:.2f}",
                    f"{first / s:.1f}x" if research and ours else "",
                    f"{moved[operation] / 1e6:.0f}M" if ours else "",
                    f"{moved[operation] / s / copy:.0%}" if ours else "",
                    f"{floor[operation] / s:.0%}" if ours and operation in floor else "",
                )
            )
    for result in results:
        ratio = result.peak_bytes / tensor_bytes
        print(f"peak of a step, {result.name}: {result.peak_bytes / 1e6:.1f} MB = {ratio:.2f} (N, V) float32 tensors")
    return {
        "shape": {"N": shape.rows, "V": shape.vocab_size, "D": shape.hidden, "M": shape.gradient_steps},
        "dtype": dtype,
        "device": device_name(shape.device),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "copy_bytes_per_second": copy,
        "product_flops_per_second": {"forward": forward, "backward": backward},
        "bytes_moved": moved,
        "results": [
            {
                "implementation": r.name,
                "seconds": r.seconds,
                "peak_bytes": r.peak_bytes,
                "peak_tensors": r.peak_bytes / tensor_bytes,
                "product_share_of_step": floor["step"] / r.seconds["step"],
            }
            for r in results
        ],
    }


def main(arguments: list[str] | None = None) -> int:
    """The program; returns its exit status."""
    parser = argparse.ArgumentParser(description="Guidance kernels against the research code's torch operations.")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--gradient-steps", type=int, default=3)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backends", nargs="+", choices=kernels.available_backends())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-research", action="store_true", help="leave the research code's sequence out")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    backends = options.backends
    if backends is None:
        wanted = ("cpp", "torch") if device.type == "cpu" else ("fused", "triton", "torch")
        backends = [name for name in wanted if name in kernels.available_backends()]
    shape = compare.Shape(
        options.rows, options.vocab, options.hidden, options.gradient_steps, DTYPES[options.dtype], device
    )
    print(json.dumps(report(shape, backends, options.repeats, not options.no_research)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

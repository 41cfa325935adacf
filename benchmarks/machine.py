"""What the benchmarks are measured on: clocks, the machine's matrix-product rate, and a description for the report.

Wall time says what a client sees, but only on a machine that does nothing else. CPU time (of all threads of this
process) stands beside it everywhere: with one thread it hardly notices the neighbours.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch

import kernels

Product = tuple[int, int, int]
"""(m, k, n): an (m, k) matrix times the transpose of an (n, k) one, as in a linear layer."""

LARGE: tuple[Product, ...] = ((1024, 1024, 1024), (2048, 2048, 2048))


class Stopwatch:
    """Seconds of wall and of CPU time since it was made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._wall, self._cpu = self._now()

    def _now(self) -> tuple[float, float]:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        """(wall, CPU) seconds; waits for the device."""
        wall, cpu = self._now()
        return wall - self._wall, cpu - self._cpu


@dataclass(frozen=True, slots=True)
class Rate:
    """FLOP per second of wall time, and of this process's CPU time."""

    wall: float
    cpu: float

    def max(self, other: Rate) -> Rate:
        """The higher rate of the two, by each clock."""
        return Rate(max(self.wall, other.wall), max(self.cpu, other.cpu))


def product_rate(product: Product, dtype: torch.dtype, device: torch.device, seconds: float = 0.3) -> Rate:
    """The rate of one matrix product: the best of the repetitions that fit in `seconds` (three at least)."""
    m, k, n = product
    a, b = (torch.randn(rows, k, device=device).to(dtype) for rows in (m, n))
    flops = 2 * m * k * n
    # The CPU clock is coarse; several products are timed together.
    repeat = min(100, max(1, int(2e9 // flops)))
    best = Rate(0.0, 0.0)
    until = time.perf_counter() + seconds
    done = 0
    while done < 3 or time.perf_counter() < until:
        watch = Stopwatch(device)
        for _ in range(repeat):
            torch.nn.functional.linear(a, b)
        wall, cpu = watch.read()
        best = best.max(Rate(flops * repeat / wall, flops * repeat / max(cpu, 1e-9)))
        done += 1
    return best


def gemm_rate(
    dtype: torch.dtype, device: torch.device, products: Sequence[Product] = LARGE, seconds: float = 0.5
) -> Rate:
    """The machine's matrix-product rate: the best over `products`, with the threads of this process."""
    best = Rate(0.0, 0.0)
    for product in products:
        best = best.max(product_rate(product, dtype, device, seconds))
    return best


def describe(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Machine, load, date and versions, for the report."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kernels": kernels.default_backend(),
    }


def _processor() -> str:
    """The CPU's name, or the architecture where /proc does not tell."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except FileNotFoundError:
        return platform.machine()
    return platform.machine()

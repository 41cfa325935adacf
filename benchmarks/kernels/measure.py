"""Time, peak memory, and the machine's own limits."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor


def synchronize(device: torch.device) -> None:
    """Waits for a GPU; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Least wall time of a call, after one call that does not count: what other programs disturbed the least."""
    function()
    synchronize(device)
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """The most that a call held at once beyond what was there before, in torch's allocators."""
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def copy_bytes_per_second(like: Tensor, repeats: int) -> float:
    """Bytes read and written a second by a plain copy of a tensor of this size."""
    source, target = torch.zeros_like(like), torch.empty_like(like)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), like.device, repeats)


def product_flops_per_second(rows: int, table: Tensor, repeats: int) -> tuple[float, float]:
    """FLOP/s of the step's two products at full size, (N, V) @ (V, D) and (N, D) @ (D, V), in the table's dtype."""
    vocab_size, hidden = table.shape
    q = torch.rand(rows, vocab_size, device=table.device, dtype=table.dtype)
    g = torch.rand(rows, hidden, device=table.device, dtype=table.dtype)
    flops = 2.0 * rows * vocab_size * hidden
    forward = torch.empty(rows, hidden, device=table.device, dtype=table.dtype)
    a = seconds(lambda: torch.mm(q, table, out=forward), table.device, repeats)
    b = seconds(lambda: torch.mm(g, table.T, out=q), table.device, repeats)
    return flops / a, flops / b

"""CUDA graphs: some hundred or thousand kernels become one launch, on the same memory every time.

What a graph's kernels read must have the shape that it was recorded with, so ragged work is padded to one of few
shapes (`bucket`). What the host decided while recording is part of the graph.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import TypeVar

import torch

Output = TypeVar("Output")

Record = Callable[[Callable[[], Output]], Callable[[], Output]]
"""Makes a graph of a function without arguments, which reads and writes the same tensors each time, and returns what
replays it: a `Recorder`; without a GPU, in tests, the function itself will do."""

_one_at_a_time = threading.Lock()
"""To begin a recording waits for the whole device, which must not be while another thread is recording."""

LEAST = 16


def bucket(count: int) -> int:
    """The least of 16, 24, 32, 48, 64, 96, ... that is not less than `count`: at most half too many, a quarter in the
    mean."""
    power = coarse_bucket(count)
    between = power * 3 // 4
    return between if between >= count and between >= LEAST else power


def coarse_bucket(count: int, least: int = LEAST) -> int:
    """The least power of two that is not less than `count` or `least`, itself one: for what costs little when it is too
    much."""
    return max(least, 1 << max(0, count - 1).bit_length())


class Recorder:
    """A `Record` for one device. Its graphs share a memory pool, so that together they take what the largest takes:
    the next replay may write over what the last one returned. They are recorded on a stream of the device's own, since
    torch's for this purpose is on whichever device was the first."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, function: Callable[[], Output]) -> Callable[[], Output]:
        """Run the function once and record it."""
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._aside.wait_stream(current)
            with torch.cuda.stream(self._aside):
                function()  # everything that is made on first use (tables, workspaces) is made outside
            current.wait_stream(self._aside)
            graph = torch.cuda.CUDAGraph()
            recording = torch.cuda.graph(graph, self._pool, self._aside, capture_error_mode="thread_local")
            with _one_at_a_time, recording:
                output = function()

        def replay() -> Output:
            graph.replay()
            return output

        return replay


@functools.cache
def recorder(device: torch.device) -> Recorder:
    """The device's one recorder, whose graphs run one after another."""
    return Recorder(device)

"""CUDA graphs: some hundred or thousand kernels become one launch, on the same memory every time.

What a graph's kernels read must have the shape that it was recorded with, so ragged work is padded to one of few
shapes (`bucket`). What the host decided while recording is part of the graph.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

Output = TypeVar("Output")

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


class Recording(Generic[Output]):
    """A function without arguments, which reads and writes the same tensors each time, as a graph. `pool` is a
    `torch.cuda.graph_pool_handle` that graphs share: the next one's replay may write over this one's output."""

    def __init__(self, function: Callable[[], Output], pool: Any) -> None:
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            function()  # everything that is made on first use (tables, workspaces) is made outside
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with _one_at_a_time, torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._output = function()

    def replay(self) -> Output:
        """What the function returns for what its tensors hold now."""
        self._graph.replay()
        return self._output

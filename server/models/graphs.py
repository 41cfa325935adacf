"""CUDA graphs of a model's trunk: a forward of some hundred kernels becomes one launch.

A graph replays the same kernels on the same memory, so each bucket of `models.padding` has its own graph with its own
inputs; all share one memory pool. The attention must be one kernel that reads its lengths from the device
(`kernels.varlen`): what the host decided at recording is part of the graph.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from kernels.recording import Recording
from server.models.base import Trunk
from server.models.packing import PackedLayout
from server.models.padding import Shape, pad, shape_of

MOST_TOKENS = 4096
"""A larger forward keeps the GPU busy for longer than its launches take, so padding it would only cost."""

MOST_GRAPHS = 48
"""The least recently used one goes first."""


class GraphedTrunk:
    """A `Trunk` that records and replays. What is returned is the caller's; nothing waits for the device."""

    def __init__(self, trunk: Trunk, *, most_tokens: int = MOST_TOKENS, most_graphs: int = MOST_GRAPHS) -> None:
        self._trunk = trunk
        self._most_tokens = most_tokens
        self._most_graphs = most_graphs
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: OrderedDict[Shape, _Recording] = OrderedDict()

    @property
    def graphs(self) -> int:
        """How many are held."""
        return len(self._graphs)

    def __call__(self, tokens: Tensor, layout: PackedLayout, rows: Tensor | None) -> Tensor:
        """See `base.Trunk`. A batch without rows, or larger than any graph, runs as it is."""
        if rows is None or not len(rows) or layout.tokens > self._most_tokens:
            return self._trunk(tokens, layout, rows)
        shape = shape_of(layout, len(rows))
        inputs = pad(tokens, layout, rows, shape)
        recording = self._graphs.get(shape)
        if recording is None:
            if len(self._graphs) >= self._most_graphs:
                self._graphs.popitem(last=False)
            recording = self._graphs[shape] = _Recording(self._trunk, *inputs, self._pool)
        self._graphs.move_to_end(shape)
        return recording.replay(*inputs)[: len(rows)].clone()  # the next graph may write over it


class _Recording:
    """One graph and the memory that it reads and writes."""

    def __init__(self, trunk: Trunk, tokens: Tensor, layout: PackedLayout, rows: Tensor, pool: Any) -> None:
        self._inputs = tokens, layout, rows  # their memory is what the graph reads from now on
        self._recording = Recording(lambda: trunk(*self._inputs), pool)

    def replay(self, tokens: Tensor, layout: PackedLayout, rows: Tensor) -> Tensor:
        """The trunk's output for other inputs of the same shape."""
        old_tokens, old_layout, old_rows = self._inputs
        old_tokens.copy_(tokens)
        old_layout.positions.copy_(layout.positions)
        old_layout.cu_seqlens.copy_(layout.cu_seqlens)
        old_rows.copy_(rows)
        return self._recording.replay()

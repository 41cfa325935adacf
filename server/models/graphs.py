"""CUDA graphs: a pass over packed tokens, of some hundred or thousand kernels, becomes one launch.

A graph replays the same kernels on the same memory. So each bucket of `models.padding` has a graph and inputs of its
own; all share one memory pool, and one place for cached keys and values. The attention must be one kernel that reads
its lengths from the device (`kernels.varlen`): what the host decided while recording is part of the graph.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from kernels.recording import Record
from server.models.packing import EMPTY_PREFIX, PackedLayout
from server.models.padding import Arena, Inputs, Shape, shape_of

MOST_TOKENS, MOST_CACHED = 2048, 4096
"""Own tokens of a pass, and cached ones. A larger pass keeps the GPU busy for longer than its launches take, so padding
it would only cost."""

MOST_GRAPHS = 48
"""The least recently used one goes first."""

Outputs = tuple[Tensor, ...]

Pass = Callable[[Tensor, PackedLayout], Outputs]
"""Inputs' x and layout -> what is computed of them."""


class Graphs:
    """Records and replays one function, in the graphs that are `held`; nothing waits for the device. `arena` holds the
    prefixes, where rows may have some. A pass of more than `most_tokens` own tokens is not worth a graph, or has no
    memory for one; keys and values that are laid out for its rows count as `key_share` of an own token each."""

    def __init__(self, function: Pass, record: Record[Outputs], arena: Arena | None = None) -> None:
        self._function, self._record, self._arena = function, record, arena
        self.most_tokens, self.key_share = MOST_TOKENS, 0.0
        self.held: OrderedDict[Shape, tuple[Inputs, Callable[[], Outputs]]] = OrderedDict()

    def takes(self, layout: PackedLayout) -> bool:
        """Whether a pass over it is small enough, its prefixes have a place, and it has no adapters, which come and
        go."""
        shape = shape_of(layout)
        placed = self._arena is not None and shape.cached <= self._arena.tokens and not any(layout.before)
        size = shape.tokens + self.key_share * max(0, shape.keys - shape.tokens)
        return size <= self.most_tokens and not layout.adapters and (placed or layout.gather is None)

    def run(self, x: Tensor, layout: PackedLayout) -> Outputs:
        """The function's results for a layout that it `takes`, with the bucket's padding at their ends. The next run
        may write over them."""
        shape, cached = shape_of(layout), EMPTY_PREFIX
        if self._arena is not None and shape.cached:
            self._arena.hold(layout.links)
            cached = self._arena.prefix(shape.cached)
        if shape not in self.held:
            if len(self.held) >= MOST_GRAPHS:
                self.held.popitem(last=False)
            inputs = Inputs(shape, x, cached, layout.cu_q.device)
            inputs.fill(x, layout)
            # A layout remembers what it has worked out of its tensors, so each run gets a new one: else the graph would
            # keep the first run's.
            self.held[shape] = inputs, self._record(lambda: self._function(inputs.x, replace(inputs.layout)))
        self.held.move_to_end(shape)
        inputs, replay = self.held[shape]
        inputs.fill(x, layout)
        return replay()


class GraphedTrunk:
    """A `base.Trunk` as graphs. A graph computes the states of all tokens, so that batches which differ in what is read
    share it."""

    def __init__(self, trunk: Callable[[Tensor, PackedLayout, Tensor | None], Tensor], record: Record[Outputs]) -> None:
        self._trunk = trunk
        self.recorded = Graphs(lambda tokens, layout: (trunk(tokens, layout, None),), record)

    def __call__(self, tokens: Tensor, layout: PackedLayout, rows: Tensor | None) -> Tensor:
        """See `base.Trunk`. A batch without rows, or larger than any graph, runs as it is."""
        if rows is None or torch.is_grad_enabled() or not self.recorded.takes(layout):
            return self._trunk(tokens, layout, rows)
        return self.recorded.run(tokens, layout)[0].index_select(0, rows)

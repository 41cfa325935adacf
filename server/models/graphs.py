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

from kernels.recording import Recording
from server.models.packing import EMPTY_PREFIX, PackedLayout
from server.models.padding import Arena, Inputs, Shape, pad, shape_of

MOST_TOKENS = 4096
"""Own tokens of a pass, and cached ones. A larger pass keeps the GPU busy for longer than its launches take, so padding
it would only cost."""

MOST_GRAPHS = 48
"""The least recently used one goes first."""

Pass = Callable[[Tensor, PackedLayout, Tensor], tuple[Tensor, ...]]
"""Inputs' x, layout and rows -> what is computed of them."""

Record = Callable[[Callable[[], tuple[Tensor, ...]]], Callable[[], tuple[Tensor, ...]]]
"""Makes a graph of a pass over inputs that stay where they are, and returns what replays it: `recorder()`; without a
GPU, in tests, the pass itself will do."""


def recorder() -> Record:
    """`kernels.recording.Recording` with a memory pool that all its graphs share, on the current device."""
    pool = torch.cuda.graph_pool_handle()
    return lambda function: Recording(function, pool).replay


class Graphs:
    """Records and replays one function, in the graphs that are `held`. What is returned is the caller's; nothing waits
    for the device. `arena` holds the prefixes, where rows may have some."""

    def __init__(self, function: Pass, record: Record, arena: Arena | None = None) -> None:
        self._function, self._record, self._arena = function, record, arena
        self.held: OrderedDict[Shape, tuple[Inputs, Callable[[], tuple[Tensor, ...]]]] = OrderedDict()

    def takes(self, layout: PackedLayout) -> bool:
        """Whether a pass over it is no larger than a graph is worth, its prefixes have a place, and it has no adapters,
        which come and go."""
        shape = shape_of(layout)
        placed = not layout.adapters and not (layout.links and self._arena is None)
        return placed and max(shape.tokens, shape.cached) <= MOST_TOKENS

    def run(self, x: Tensor, layout: PackedLayout, rows: Tensor) -> tuple[Tensor, ...]:
        """The function's results for a layout that it `takes`, with the bucket's padding at their ends."""
        shape = shape_of(layout, len(rows))
        cached = EMPTY_PREFIX
        if self._arena is not None and shape.cached:
            self._arena.hold(layout.links)
            cached = self._arena.prefix(shape.cached)
        inputs = pad(x, layout, rows, shape, cached)
        if shape not in self.held:
            if len(self.held) >= MOST_GRAPHS:
                self.held.popitem(last=False)
            # From now on the graph reads the memory of these inputs. A layout remembers what it has worked out of its
            # tensors, so each run gets a new one: else the graph would keep the first run's.
            replay = self._record(lambda: self._function(inputs.x, replace(inputs.layout), inputs.rows))
            self.held[shape] = inputs, replay
        self.held.move_to_end(shape)
        memory, replay = self.held[shape]
        memory.copy_(inputs)
        return tuple(result.clone() for result in replay())  # the next graph may write over them


class GraphedTrunk:
    """A `base.Trunk` as graphs."""

    def __init__(self, trunk: Callable[[Tensor, PackedLayout, Tensor | None], Tensor], record: Record) -> None:
        self._trunk = trunk
        self.recorded = Graphs(lambda tokens, layout, rows: (trunk(tokens, layout, rows),), record)

    def __call__(self, tokens: Tensor, layout: PackedLayout, rows: Tensor | None) -> Tensor:
        """See `base.Trunk`. A batch without rows, or larger than any graph, runs as it is."""
        if rows is None or not len(rows) or not self.recorded.takes(layout):
            return self._trunk(tokens, layout, rows)
        return self.recorded.run(tokens, layout, rows)[0][: len(rows)]

"""CUDA graphs: a pass over packed tokens, of some hundred or thousand kernels, becomes one launch.

A graph replays the same kernels on the same memory. So each bucket of `models.padding` has a graph and inputs of its
own; all share one memory pool, and one place for cached keys and values. The attention must be one kernel that reads
its lengths from the device (`kernels.varlen`): what the host decided while recording is part of the graph.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

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


class Replayed(Protocol):
    """A pass over inputs that stay where they are."""

    def replay(self) -> tuple[Tensor, ...]:
        """Of what they hold now."""


Record = Callable[[Callable[[], tuple[Tensor, ...]]], Replayed]
"""What makes a graph of a pass: `recorder()`; without a GPU, in tests, what runs it again will do."""


def recorder() -> Record:
    """`kernels.recording.Recording` with a memory pool that all its graphs share, on the current device."""
    pool = torch.cuda.graph_pool_handle()
    return lambda function: Recording(function, pool)


class Graphs:
    """Records and replays one function. What is returned is the caller's; nothing waits for the device. `arena` holds
    the prefixes, where rows may have some."""

    def __init__(
        self,
        function: Pass,
        record: Record,
        arena: Arena | None = None,
        *,
        most_tokens: int = MOST_TOKENS,
        most_graphs: int = MOST_GRAPHS,
    ) -> None:
        self._function, self._record, self._arena = function, record, arena
        self._most_tokens, self._most_graphs = most_tokens, most_graphs
        self._graphs: OrderedDict[Shape, tuple[Inputs, Replayed]] = OrderedDict()

    @property
    def graphs(self) -> int:
        """How many are held."""
        return len(self._graphs)

    def takes(self, layout: PackedLayout) -> bool:
        """Whether a pass over it is no larger than a graph is worth, and its prefixes have a place."""
        shape = shape_of(layout)
        return max(shape.tokens, shape.cached) <= self._most_tokens and not (layout.links and self._arena is None)

    def run(self, x: Tensor, layout: PackedLayout, rows: Tensor) -> tuple[Tensor, ...]:
        """The function's results for a layout that it `takes`, with the bucket's padding at their ends."""
        shape = shape_of(layout, len(rows))
        cached = EMPTY_PREFIX
        if self._arena is not None and shape.cached:
            self._arena.hold(layout.links)
            cached = self._arena.prefix(shape.cached)
        inputs = pad(x, layout, rows, shape, cached)
        if shape not in self._graphs:
            if len(self._graphs) >= self._most_graphs:
                self._graphs.popitem(last=False)
            # From now on the graph reads the memory of these inputs. A layout remembers what it has worked out of its
            # tensors, so each run gets a new one: else the graph would keep the first run's.
            replayed = self._record(lambda: self._function(inputs.x, replace(inputs.layout), inputs.rows))
            self._graphs[shape] = inputs, replayed
        self._graphs.move_to_end(shape)
        memory, graph = self._graphs[shape]
        memory.copy_(inputs)
        return tuple(result.clone() for result in graph.replay())  # the next graph may write over them


class GraphedTrunk:
    """A `base.Trunk` as graphs."""

    def __init__(
        self,
        trunk: Callable[[Tensor, PackedLayout, Tensor | None], Tensor],
        record: Record,
        *,
        most_tokens: int = MOST_TOKENS,
        most_graphs: int = MOST_GRAPHS,
    ) -> None:
        self._trunk = trunk
        self.recorded = Graphs(
            lambda tokens, layout, rows: (trunk(tokens, layout, rows),),
            record,
            most_tokens=most_tokens,
            most_graphs=most_graphs,
        )

    def __call__(self, tokens: Tensor, layout: PackedLayout, rows: Tensor | None) -> Tensor:
        """See `base.Trunk`. A batch without rows, or larger than any graph, runs as it is."""
        if rows is None or not len(rows) or not self.recorded.takes(layout):
            return self._trunk(tokens, layout, rows)
        return self.recorded.run(tokens, layout, rows)[0][: len(rows)]

"""What stands in for a CUDA graph where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class Again:
    """In place of a graph: the same function on the same memory, run again."""

    def __init__(self, function: Callable[[], tuple[Tensor, ...]]) -> None:
        self.replay = function

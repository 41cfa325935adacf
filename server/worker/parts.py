"""Work on more items than memory takes at once: in parts, in order, each within limits that shrink when it runs out.

A denoising step uses this twice: for the forward of the diffusion model (limited in canvas tokens) and for what is done
with its hidden states (limited in rows of logits and in reward-model tokens), where the items are whole trajectories.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from server.worker.failures import Attempt, free_memory

logger = logging.getLogger(__name__)

T = TypeVar("T")

RECOVERY_PARTS = 1000
"""After this many parts without a shortage, shrunken limits double, up to what they were at the start: another program
may have taken the memory and given it back. If it has not, one part in a thousand runs twice."""


class Part(Attempt, Generic[T]):
    """Some neighbours among the items, and the attempt at them. `lost`: memory ran out for them a second time."""

    def __init__(self, items: Sequence[T], *, again: bool, ran_out: Callable[[], None]) -> None:
        super().__init__(ran_out)
        self.items = items
        self._again = again

    @property
    def lost(self) -> bool:
        """Whether these items are given up."""
        return self.ran_out and self._again


class Limits:
    """How large one part may be, in every dimension of its items' sizes. `ran_out` is called whenever memory does."""

    def __init__(self, name: str, most: tuple[int, ...], ran_out: Callable[[], None] = free_memory) -> None:
        self.name = name
        self.most = most
        self.now = most
        self._ran_out = ran_out
        self._quiet = 0  # parts since the last shortage

    def parts(self, items: Sequence[T], sizes: Sequence[tuple[int, ...]]) -> Iterator[Part[T]]:
        """The parts to work on, each inside its own `with part:`, in the order of `items`.

        A part is a run of neighbours whose `sizes` together keep the limits, or a single item. When memory runs out
        in one, the limits shrink to half of it and its items come once more, in smaller parts; so the block must
        leave no trace when it fails. Items for which memory runs out again are `lost`.
        """
        start = second_try = 0  # items before `second_try` have had their first try
        while start < len(items):
            again = start < second_try
            stop = self._stop(sizes[:second_try] if again else sizes, start)
            part = Part(items[start:stop], again=again, ran_out=self._ran_out)
            yield part
            if part.ran_out and not again:
                self._shrink(sizes[start:stop])
                second_try = stop
                continue
            if part.lost:
                logger.error("%s: memory ran out again; %d trajectories are given up", self.name, len(part.items))
            else:
                self._recover()
            start = stop

    def _stop(self, sizes: Sequence[tuple[int, ...]], start: int) -> int:
        """Where the part that begins at item `start` ends."""
        total = sizes[start]
        stop = start + 1
        while stop < len(sizes):
            total = tuple(a + b for a, b in zip(total, sizes[stop], strict=True))
            if any(size > limit for size, limit in zip(total, self.now, strict=True)):
                break
            stop += 1
        return stop

    def _shrink(self, sizes: Sequence[tuple[int, ...]]) -> None:
        total = [sum(column) for column in zip(*sizes, strict=True)]
        self.now = tuple(max(1, min(limit, size // 2)) for limit, size in zip(self.now, total, strict=True))
        self._quiet = 0
        logger.warning("%s: memory ran out at %s; the limits are %s from now on", self.name, total, list(self.now))

    def _recover(self) -> None:
        if self.now == self.most:
            return
        self._quiet += 1
        if self._quiet >= RECOVERY_PARTS:
            self._quiet = 0
            self.now = tuple(min(2 * limit, most) for limit, most in zip(self.now, self.most, strict=True))
            logger.info("%s: the limits are %s again", self.name, list(self.now))

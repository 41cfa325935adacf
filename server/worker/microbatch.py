"""Work on more items than memory takes at once: in parts, in order, each within limits that shrink when it runs out.

A denoising step uses this twice: for the forward of the diffusion model (limited in canvas tokens) and for what is done
with its hidden states (limited in rows of logits and in reward-model tokens), where the items are whole trajectories.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from server.budget import Budget
from server.worker.out_of_memory import attempt

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

RECOVERY_PARTS = 1000
"""After so many parts without trouble shrunken limits double, up to what they were: who took the memory may be gone.
If not, it costs one part of a thousand a second run."""


class Limits:
    """How large one part may be, in every dimension of its items' sizes. `ran_out` is called whenever memory does."""

    def __init__(self, name: str, most: tuple[int, ...], ran_out: Callable[[], None] = lambda: None) -> None:
        self.name = name
        self.most = most
        self.now = most
        self._ran_out = ran_out
        self._quiet = 0  # parts that went well since

    def run(
        self, items: Sequence[T], sizes: Sequence[tuple[int, ...]], work: Callable[[Sequence[T]], R]
    ) -> tuple[list[R], list[T]]:
        """What `work` returned for each part, in the order of `items`, and the items for which memory ran out twice.

        A part is a run of neighbours whose `sizes` together keep the limits, or a single item. When memory runs out
        for one, the limits shrink to half of it and its items are tried once more, in smaller parts; so `work` must
        leave no trace when it fails.
        """
        results: list[R] = []
        lost: list[T] = []
        start = second_try = 0  # items before `second_try` have had their first
        while start < len(items):
            again = start < second_try
            stop = self._stop(sizes[:second_try] if again else sizes, start)
            part = items[start:stop]
            result = attempt(lambda part=part: work(part))  # type: ignore[misc]
            if result is not None:
                results.append(result)
                self._recover()
                start = stop
            elif again:
                self._ran_out()
                logger.error("%s: memory ran out again; %d trajectories are given up", self.name, len(part))
                lost += part
                start = stop
            else:
                self._ran_out()
                self._shrink(sizes[start:stop])
                second_try = stop
        return results, lost

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


@dataclass(frozen=True, slots=True)
class StepLimits:
    """Of a denoising step: the forward in canvas tokens, guidance in rows of logits and reward-model tokens, and what
    is done without it in rows."""

    forwards: Limits
    guided: Limits
    unguided: Limits

    @classmethod
    def of(cls, budget: Budget, ran_out: Callable[[], None]) -> StepLimits:
        """Those of a budget."""
        return cls(
            Limits("forward (canvas tokens)", (budget.tokens,), ran_out),
            Limits("guidance (rows, tokens)", (budget.guided_rows, budget.reward_tokens), ran_out),
            Limits("unguided rows", (budget.logit_rows,), ran_out),
        )

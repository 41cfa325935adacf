"""What to do when work fails: memory that runs out is freed and the work tried again; any other exception, and memory
that runs out twice, becomes the event that ends the job. Imports no torch by itself.

Work on more items than memory takes at once is done in parts, in order, each within limits that shrink when it runs
out. A denoising step uses this twice: for the forward of the diffusion model (limited in canvas tokens) and for what is
done with its hidden states (limited in rows of logits and in reward-model tokens), where the items are whole
trajectories.
"""

from __future__ import annotations

import gc
import logging
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Generic, TypeVar

from server.errors import RequestError
from server.wire.messages import Event, Failed

logger = logging.getLogger(__name__)

T = TypeVar("T")

RECOVERY_PARTS = 1000
"""After this many parts without a shortage, shrunken limits double, up to what they were at the start: another program
may have taken the memory and given it back. If it has not, one part in a thousand runs twice."""


SHORTAGES = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
"""What a RuntimeError says when memory ran out that is no torch.OutOfMemoryError: the driver's, as torch's
AcceleratorError or Triton has it; cuBLAS's and cuDNN's; torch's on a CPU."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory left."""
    if isinstance(error, MemoryError):
        return True
    # torch's own is a RuntimeError too, and says it in the same words.
    return isinstance(error, RuntimeError) and any(shortage in str(error) for shortage in SHORTAGES)


def out_of_memory(job_id: str) -> Failed:
    """The event that ends a job for which there is not enough memory."""
    return Failed(job_id, "out_of_memory", "the device ran out of memory")


def free_memory() -> None:
    """Give back what a failed try still holds."""
    gc.collect()  # autograd's graph and frames may be cycles
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # blocks of other sizes go back to the device


@dataclass
class Attempt:
    """A try that may run out of memory: `with Attempt() as attempt: ...` goes on after the block when it does, with
    `attempt.ran_out` set and the tensors of the functions that had been called in the block let go. Other exceptions
    pass. `free` is called then, to free the memory."""

    free: Callable[[], None] = free_memory
    ran_out: bool = field(default=False, init=False)

    def __enter__(self) -> Attempt:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None or not is_out_of_memory(error):
            return False
        traceback.clear_frames(trace)  # their locals are the tensors of the failed try
        self.ran_out = True
        self.free()
        return True


@dataclass
class Part(Attempt, Generic[T]):
    """An attempt at some neighbours among the items. `again`: they have had one already."""

    items: Sequence[T] = ()
    again: bool = False

    @property
    def lost(self) -> bool:
        """Whether these items are given up."""
        return self.ran_out and self.again


class Limits:
    """How large one part may be, in every dimension of its items' sizes. `free` is called when memory runs out."""

    def __init__(self, name: str, most: tuple[int, ...], free: Callable[[], None] = free_memory) -> None:
        self.name = name
        self.most = most
        self.now = most
        self._free = free
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
            part = Part(self._free, items[start:stop], again)
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
        self._quiet += 1
        if self.now != self.most and self._quiet >= RECOVERY_PARTS:
            self._quiet = 0
            self.now = tuple(min(2 * limit, most) for limit, most in zip(self.now, self.most, strict=True))
            logger.info("%s: the limits are %s again", self.name, list(self.now))


def failed(job_ids: Iterable[str], error: Exception) -> list[Event]:
    """The events that end these jobs. What was raised on purpose says so; what was not goes to the log with its
    traceback, because its text may hold anything, and the client is told no more than that it happened."""
    ids = list(job_ids)
    if isinstance(error, RequestError):
        return [Failed.of(job_id, error) for job_id in ids]
    logger.error("an exception ends jobs %s", ids, exc_info=error)
    traceback.clear_frames(error.__traceback__)  # their locals may be large tensors
    if is_out_of_memory(error):
        return [out_of_memory(job_id) for job_id in ids]
    return [Failed(job_id, "internal", "an internal error ended this request") for job_id in ids]

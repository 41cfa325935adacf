"""What to do when work fails: memory that runs out is freed and the work tried again; any other exception, and memory
that runs out twice, becomes the event that ends the job. Imports no torch by itself."""

from __future__ import annotations

import gc
import logging
import sys
import traceback
from collections.abc import Callable, Iterable
from types import TracebackType

from server.errors import RequestError
from server.wire.messages import Event, Failed

logger = logging.getLogger(__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory left."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    # torch's CPU allocator raises a plain RuntimeError.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def out_of_memory(job_id: str) -> Failed:
    """The event that ends a job for which there is not enough memory."""
    return Failed(job_id, "out_of_memory", "the device ran out of memory")


def free_memory() -> None:
    """Give back what a failed try still holds."""
    gc.collect()  # autograd's graph and frames may be cycles
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # blocks of other sizes go back to the device


class Attempt:
    """A try that may run out of memory: `with Attempt() as attempt: ...` goes on after the block when it does, with
    `attempt.ran_out` set and the tensors of the functions that had been called in the block let go. Other exceptions
    pass. `ran_out` (the argument) is called then; it frees the memory."""

    def __init__(self, ran_out: Callable[[], None] = free_memory) -> None:
        self.ran_out = False
        self._when_it_does = ran_out

    def __enter__(self) -> Attempt:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None or not is_out_of_memory(error):
            return False
        traceback.clear_frames(trace)  # their locals are the tensors of the failed try
        self.ran_out = True
        self._when_it_does()
        return True


def failed(job_ids: Iterable[str], error: Exception) -> list[Event]:
    """The events that end these jobs. What was raised on purpose says so; what was not goes to the log with its
    traceback, because its text may hold anything, and the client is told no more than that it happened."""
    ids = list(job_ids)
    if isinstance(error, RequestError):
        return [Failed(job_id, error.kind, error.message, error.param) for job_id in ids]
    logger.error("an exception ends jobs %s", ids, exc_info=error)
    traceback.clear_frames(error.__traceback__)  # their locals may be large tensors
    if is_out_of_memory(error):
        return [out_of_memory(job_id) for job_id in ids]
    return [Failed(job_id, "internal", "an internal error ended this request") for job_id in ids]

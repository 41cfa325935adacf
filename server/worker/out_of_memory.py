"""When memory runs out: to recognise it, and to try something that may run into it. Imports no torch by itself."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import TypeVar

R = TypeVar("R")

OUT_OF_MEMORY = "the device ran out of memory"
"""What a client is told."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory left."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    # torch's CPU allocator raises a plain RuntimeError.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def attempt(work: Callable[[], R]) -> R | None:
    """What `work` returns, or None where memory ran out; what it had allocated until then is free again.

    Other exceptions pass. The caller tries again only after the return: as long as the exception is being handled, its
    traceback holds every tensor of the failed try.
    """
    try:
        return work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    gc.collect()  # autograd's graph and the traceback's frames may be cycles
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # blocks of other sizes go back to the device
    return None

"""How the C library's allocator treats the large blocks of a denoising step on a CPU.

glibc takes every block over 32 MiB fresh from the kernel and gives it back when freed, so each step would fault in its
logits, gradients and work space page by page: some 4 to 8% of a guided step of the pair of `make bench`.
Here such blocks stay with the process. The price: aligned blocks seldom fit exactly where the last one was, so before
places repeat the heap may hold eight of the largest kind. Hence a limit of 256 MiB, or an eighth of the memory that the
engine's budgets leave alone, where that is less.
"""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGE_BYTES = 256 << 20  # a larger block still comes from the kernel
DEFAULT_BYTES = 32 << 20  # up to this size glibc keeps blocks by itself
BLOCKS_HELD = 8  # of the largest kind, at most (seen: some)
KEPT_BYTES = (1 << 31) - 1  # free memory at the heap's end that is not given back; the largest value there is


def keep_large_blocks(spare_bytes: float) -> bool:
    """Let freed blocks be used again, up to a size at which what the heap then holds fits into `spare_bytes`. Returns
    whether it does: there must be memory to spare, and the C library must be one that can (glibc)."""
    large = min(LARGE_BYTES, int(spare_bytes / BLOCKS_HELD))
    if large <= DEFAULT_BYTES or platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(M_MMAP_THRESHOLD, large)) and bool(library.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))

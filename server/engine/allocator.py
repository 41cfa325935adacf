"""How the C library's allocator treats the large blocks of a denoising step on a CPU.

glibc takes every block over 32 MiB fresh from the kernel and gives it back when freed, so each step would fault in its
logits, gradients and work space page by page: some 4 to 8% of a guided step of the pair of `make bench`.
Here such blocks stay with the process. The price: aligned blocks seldom fit exactly where the last one was, so before
places repeat the heap may hold eight of the largest kind; hence the limit of 256 MiB.
"""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGE_BYTES = 256 << 20  # a larger block still comes from the kernel
KEPT_BYTES = (1 << 31) - 1  # free memory at the heap's end that is not given back; the largest value there is


def keep_large_blocks() -> bool:
    """Let freed blocks of up to `LARGE_BYTES` be used again. Returns whether the C library is one that can (glibc)."""
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)) and bool(library.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))

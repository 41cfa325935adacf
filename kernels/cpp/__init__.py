"""Backend "cpp": the passes of `kernels.tiled` fused in one C++ file, compiled on first use and called with ctypes."""

from kernels.cpp.build import Library, library, unavailable_reason
from kernels.cpp.ops import CppState

__all__ = ["CppState", "Library", "library", "unavailable_reason"]

"""Backend "cpp": the passes of `kernels.tiled` fused in one C++ file, compiled on first use and called with ctypes."""

from kernels.cpp.build import library
from kernels.cpp.ops import CppState

__all__ = ["CppState", "library"]

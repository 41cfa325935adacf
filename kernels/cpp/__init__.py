"""Backend "cpp": the passes of `kernels.tiled` fused in one C++ file, compiled on first use and called with ctypes."""

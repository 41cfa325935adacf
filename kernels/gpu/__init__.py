"""Backend "triton": one file an operation. Importing a module of this folder imports triton; the package does not.

Sources are valid for triton 3.6 to 3.9. Every kernel also runs in triton's interpreter on a CPU (TRITON_INTERPRET=1
before Python starts), where bfloat16 arithmetic is wrong: whatever is loaded is widened to float32 at once, and dots
are widened too when `UPCAST` says so. `benchmarks.kernels.aot` compiles every kernel for NVIDIA targets without a GPU.
"""

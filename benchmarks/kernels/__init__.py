"""Time and memory of the guidance kernels against the research code's sequence of torch operations."""

"""Masked diffusion decoding without a model: when positions are revealed, and which (algorithm.md, section 1)."""

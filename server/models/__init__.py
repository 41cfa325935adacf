"""Masked diffusion language models: our own modules that load published checkpoints and run no code from them."""

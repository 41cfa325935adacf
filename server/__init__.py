"""EntRGi server: reward-guided diffusion language models behind an OpenAI-compatible API."""

__version__ = "0.1.0"

"""How a loaded model's trunk is run: which attention, compiled or not, in CUDA graphs or not.

All of it is chosen by name and checked when the model is loaded: what cannot work here is refused with the reason.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import varlen
from server.errors import ConfigurationError
from server.models.base import DiffusionModel
from server.models.packing import PackedLayout

# The first forward has 23 tokens in 3 sequences of at most 11, and 5 rows. torch.compile gives numbers that happen to
# be equal one symbol, so these differ from each other.
FIRST_LENGTHS, FIRST_ROWS = (11, 6, 6), 5


def choose_attention(name: str, device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """`kernels.varlen.choose`, whose ValueError becomes a ConfigurationError."""
    try:
        return varlen.choose(name, device, dtype, head_size)
    except ValueError as error:
        raise ConfigurationError(f"attention_backend: {error}") from error


def accelerate(
    model: DiffusionModel, context_length: int, attention: str = "auto", *, compiled: bool = False, graphs: bool = False
) -> None:
    """Change how the model's trunk runs, as the settings attention_backend, compile and cuda_graphs say, and run it
    once. Raises ConfigurationError.

    `context_length` bounds the sequences that will come.
    """
    device, decoder = model.device, model.model
    backend = choose_attention(attention, device, model.activation_dtype, model.shape.head_size)
    decoder.attention_backend = backend
    if graphs and device.type != "cuda":
        raise ConfigurationError(f"cuda_graphs: there are none on {device}")
    if device.type == "cuda" and backend == "sdpa" and (compiled or graphs):
        raise ConfigurationError(
            f"{'cuda_graphs' if graphs else 'compile'}: it needs the attention backend varlen, which sdpa's loop over "
            "sequences cannot replace"
        )
    # A table that grew later would leave recorded graphs with the memory of the old one.
    nowhere = torch.empty(0, dtype=torch.int64, device=device)
    decoder.rotary.rows(nowhere, context_length, model.activation_dtype)
    if compiled:
        from server.models.compiled import compiled_trunk

        model.trunk = compiled_trunk(decoder, model.plain_trunk)
        _try(model, "compile")  # compiles
    if graphs:
        from server.models.graphs import GraphedTrunk, recorder

        model.trunk = GraphedTrunk(model.trunk, recorder())
        _try(model, "cuda_graphs")


def _try(model: DiffusionModel, setting: str) -> None:
    """One small forward, in which compilers and recorders say what they lack."""
    layout = PackedLayout.of(FIRST_LENGTHS, model.device)
    tokens: Tensor = torch.zeros(layout.tokens, dtype=torch.int64, device=model.device)
    try:
        with torch.no_grad():
            model.trunk(tokens, layout, torch.arange(FIRST_ROWS, device=model.device))
    except Exception as error:
        raise ConfigurationError(f"{setting}: the model cannot be run so here: {reason(error)}") from error


def reason(error: Exception) -> str:
    """The first lines of what a compiler or recorder said."""
    return "; ".join(str(error).strip().splitlines()[:2]) or type(error).__name__

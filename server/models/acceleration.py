"""How a loaded model's trunk is run: which attention, compiled or not, in CUDA graphs or not.

All of it is chosen by name when the model is loaded. An attention or a compiler that cannot work here is refused with
the reason; graphs are a saving, so where they cannot work the trunk runs without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels import varlen
from kernels.recording import Record, recorder
from kernels.trial import TOLERANCE, difference
from server.errors import ConfigurationError
from server.models.base import DiffusionModel, Trunk
from server.models.graphs import GraphedTrunk, Outputs
from server.models.packing import PackedLayout

# The first forward has 23 tokens in 3 sequences of at most 11, and 5 rows. torch.compile gives numbers that happen to
# be equal one symbol, so these differ from each other. Graphs run the others in the same bucket.
FIRST_LENGTHS, FIRST_ROWS = (11, 6, 6), 5
TRIAL_LENGTHS = FIRST_LENGTHS, (9, 8, 4), (19, 5)


def choose_attention(name: str, device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """`kernels.varlen.choose`, whose ValueError becomes a ConfigurationError."""
    try:
        return varlen.choose(name, device, dtype, head_size)
    except ValueError as error:
        raise ConfigurationError(f"attention_backend: {error}") from error


def accelerate(model: DiffusionModel, context_length: int, attention: str = "auto", *, compiled: bool = False) -> None:
    """Change how the model's trunk runs, as the settings attention_backend and compile say. Raises ConfigurationError.

    `context_length` bounds the sequences that will come.
    """
    device, decoder = model.device, model.model
    backend = choose_attention(attention, device, model.activation_dtype, model.shape.head_size)
    decoder.attention_backend = backend
    # A table that grew later would leave recorded graphs with the memory of the old one.
    nowhere = torch.empty(0, dtype=torch.int64, device=device)
    decoder.rotary.rows(nowhere, context_length, model.activation_dtype)
    if not compiled:
        return
    if device.type == "cuda" and backend == "sdpa":
        raise ConfigurationError(
            "compile: it needs the attention backend varlen, which sdpa's loop over sequences cannot replace"
        )
    from server.models.compiled import compiled_trunk

    model.trunk = compiled_trunk(decoder, model.plain_trunk)
    try:
        _trial(model.trunk, FIRST_LENGTHS, device)  # compiles
    except Exception as error:
        raise ConfigurationError(f"compile: the model cannot be run so here: {reason(error)}") from error


def graph_trunk(model: DiffusionModel, record: Record[Outputs] | None = None) -> str:
    """Let the model's trunk, as it runs by now, run as CUDA graphs after some have agreed with what they are graphs of.
    Returns why it does not, "" where it does. `record` is the device's `recorder` unless a test names another."""
    if record is None and (unfit := graphless(model.device, model.model.attention_backend)):
        return unfit
    graphed = GraphedTrunk(model.trunk, record or recorder(model.device))

    def trial() -> float:
        ways = graphed, model.trunk
        return difference(*([_trial(way, lengths, model.device) for lengths in TRIAL_LENGTHS] for way in ways))

    if not (unfit := tried(trial)):
        model.trunk = graphed
    return unfit


def graphless(device: torch.device, attention: str) -> str:
    """Why a model on a device with this attention has no graphs; "" where it may."""
    if device.type != "cuda":
        return f"there are none on {device}"
    return "" if attention == "varlen" else f"they need the attention backend varlen, not {attention}"


def tried(trial: Callable[[], float]) -> str:
    """Why graphs are not to be trusted whose largest difference is what `trial` returns; "" where they are."""
    try:
        off = trial()
    except Exception as error:
        return f"a trial run failed: {reason(error)}"
    return "" if off <= TOLERANCE else f"a trial run was off by {off:.3g}"


@torch.no_grad()
def _trial(trunk: Trunk, lengths: Sequence[int], device: torch.device) -> Tensor:
    """One small forward, in which compilers and recorders say what they lack."""
    layout = PackedLayout.of(lengths, device)
    tokens = torch.arange(layout.tokens, device=device) % 7
    return trunk(tokens, layout, torch.arange(FIRST_ROWS, device=device))


def reason(error: Exception) -> str:
    """The first lines of what a compiler or recorder said."""
    return "; ".join(str(error).strip().splitlines()[:2]) or type(error).__name__

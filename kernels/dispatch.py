"""Chooses the implementation: by device, dtype and what this machine can run."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpp import CppState, library
from kernels.cpp.ops import DTYPES as CPP_DTYPES
from kernels.ops import Guided, RowParams
from kernels.reference import ReferenceState
from kernels.torch_ops import TorchState

STATES: dict[str, type[Guided]] = {"reference": ReferenceState, "torch": TorchState, "cpp": CppState}
BACKENDS = tuple(STATES)
OPS = ("row_stats", "draw", "filtered_stats", "mix", "update")


def choose(device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs when none is named. Float64 takes plain torch everywhere."""
    if device.type == "cpu" and dtype in CPP_DTYPES and library() is not None:
        return "cpp"
    return "torch"


def available_backends() -> tuple[str, ...]:
    """Names of `BACKENDS` that can run on this machine."""
    return tuple(name for name in BACKENDS if name != "cpp" or library() is not None)


def open_state(logits: Tensor, params: RowParams, backend: str | None, updates: int | None) -> Guided:
    """The state class for these logits; `backend` None lets the dispatcher choose.

    Raises ValueError for an unknown name, or one that cannot run on these logits or this machine.
    """
    name = backend or choose(logits.device, logits.dtype)
    if name not in STATES:
        raise ValueError(f"unknown kernel backend {name!r}; known: {', '.join(BACKENDS)}")
    return STATES[name](logits, params, updates)


def backend_info() -> dict[str, str]:
    """Op -> the implementation that runs for 32-bit and 16-bit logits on this machine's default device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return dict.fromkeys(OPS, choose(device, torch.float32))

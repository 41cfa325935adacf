"""Chooses the implementation: by device, dtype and what this machine can run."""

from __future__ import annotations

from torch import Tensor

from kernels.ops import Guided, RowParams
from kernels.reference import ReferenceState
from kernels.torch_ops import TorchState

STATES: dict[str, type[Guided]] = {"reference": ReferenceState, "torch": TorchState}
BACKENDS = tuple(STATES)


def open_state(logits: Tensor, params: RowParams, backend: str | None, updates: int | None) -> Guided:
    """The state class for these logits; `backend` None lets the dispatcher choose.

    Raises ValueError for an unknown name.
    """
    if backend not in (None, *BACKENDS):
        raise ValueError(f"unknown kernel backend {backend!r}; known: {', '.join(BACKENDS)}")
    return STATES[backend or "torch"](logits, params, updates)


def backend_info() -> dict[str, str]:
    """Op -> the implementation that runs on this machine's default device."""
    return dict.fromkeys(("row_stats", "draw", "filtered_stats", "mix", "update"), "torch")

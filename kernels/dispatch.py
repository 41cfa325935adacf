"""Chooses the implementation of an operation on logits: by device, dtype and `kernels.settings`."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpp import CppState, library
from kernels.cpp.build import LOGITS_DTYPES
from kernels.ops import Guided, RowParams
from kernels.reference import ReferenceState
from kernels.settings import BACKENDS, has_triton, settings
from kernels.torch_ops import TorchState

OPS = ("row_stats", "draw", "filtered_stats", "mix", "update")


def state_class(name: str) -> type[Guided]:
    """The state of a backend by name; ValueError for an unknown one."""
    if name == "triton":
        if not has_triton():
            raise ValueError("the triton backend needs triton and a CUDA device")
        from kernels.gpu.ops import TritonState

        return TritonState
    found: dict[str, type[Guided]] = {"reference": ReferenceState, "torch": TorchState, "cpp": CppState}
    if name not in found:
        raise ValueError(f"unknown kernel backend {name!r}; known: {', '.join(BACKENDS)}")
    return found[name]


def choose(device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs when none is named. Float64 takes plain torch everywhere.

    One that KERNELS_BACKEND names must be able to run on this machine, and takes only logits that it can.
    """
    wanted = settings()
    if wanted.plain:
        return str(wanted.backend)
    if dtype == torch.float64:
        return "torch"
    if wanted.backend is not None and (wanted.backend == "triton") == (device.type == "cuda"):
        return wanted.backend
    if device.type == "cuda" and has_triton():
        return "triton"
    if device.type == "cpu" and dtype in LOGITS_DTYPES and library() is not None:
        return "cpp"
    return "torch"


def available_backends() -> tuple[str, ...]:
    """Names of `BACKENDS` that can run on this machine."""
    there = {"cpp": library() is not None, "triton": has_triton()}
    return tuple(name for name in BACKENDS if there.get(name, True))


def open_state(logits: Tensor, params: RowParams, backend: str | None, updates: int | None) -> Guided:
    """The state for these logits in the named backend, or the one that `choose` gives.

    Raises ValueError for an unknown name, or one that cannot run on these logits or this machine.
    """
    return state_class(backend or choose(logits.device, logits.dtype))(logits, params, updates)


def backend_info() -> dict[str, str]:
    """Op -> the implementation that runs for 32-bit and 16-bit logits on this machine's default device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return dict.fromkeys(OPS, choose(device, torch.float32))

"""Chooses the implementation of an operation on logits: by device, dtype and `kernels.settings`."""

from __future__ import annotations

import torch

from kernels.cpp import CppState, library
from kernels.cpp.build import DTYPES
from kernels.ops import Guided
from kernels.reference import ReferenceState
from kernels.settings import BACKENDS, has_triton, settings
from kernels.torch_ops import TorchState


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
    if device.type == "cuda" and dtype != torch.float64:
        return "triton" if wanted.backend == "triton" or has_triton() else "torch"
    if device.type == "cpu" and dtype in DTYPES:
        return "cpp" if wanted.backend == "cpp" or library() is not None else "torch"
    return "torch"


def available_backends() -> tuple[str, ...]:
    """Names of `BACKENDS` that can run on this machine."""
    there = {"cpp": library() is not None, "triton": has_triton()}
    return tuple(name for name in BACKENDS if there.get(name, True))


def default_backend() -> str:
    """The backend that runs for 32-bit and 16-bit logits on this machine's default device."""
    return choose(torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.float32)

"""Chooses the implementation: by device, dtype and what this machine can run.

Two environment variables change the choice, for tests and experiments: KERNELS_BACKEND names a backend for all logits
that it can take, and KERNELS_CPU_PRODUCTS=bfloat16 makes the CPU's matrix products run in bfloat16, on processors
with instructions for it (avx512_bf16, amx_bf16) and only there.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cpp import CppState, library
from kernels.cpp.ops import DTYPES as CPP_DTYPES
from kernels.ops import Guided, RowParams
from kernels.reference import ReferenceState
from kernels.tiled import TiledState
from kernels.torch_ops import TorchState

BACKENDS = ("reference", "torch", "cpp", "triton")
OPS = ("row_stats", "draw", "filtered_stats", "mix", "update")


@dataclass(frozen=True, slots=True)
class Settings:
    """What the environment asks for."""

    backend: str | None
    cpu_products: torch.dtype


def settings() -> Settings:
    """Reads the environment; ValueError names the variable that holds something unknown."""
    backend = os.environ.get("KERNELS_BACKEND") or None
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"KERNELS_BACKEND is {backend!r}; known: {', '.join(BACKENDS)}")
    products = os.environ.get("KERNELS_CPU_PRODUCTS") or "float32"
    if products not in ("float32", "bfloat16"):
        raise ValueError(f"KERNELS_CPU_PRODUCTS is {products!r}; known: float32, bfloat16")
    return Settings(backend, getattr(torch, products))


@functools.cache
def has_bfloat16_products() -> bool:
    """Whether the processor multiplies bfloat16 matrices natively."""
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((line.split() for line in file if line.startswith("flags")), [])
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


@functools.cache
def has_triton() -> bool:
    """Whether triton can be imported (it is not imported here) and has something to run on."""
    on = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
    return on and importlib.util.find_spec("triton") is not None


def state_class(name: str) -> type[Guided]:
    """The state of a backend by name; ValueError for an unknown one."""
    if name == "reference":
        return ReferenceState
    if name == "torch":
        return TorchState
    if name == "cpp":
        return CppState
    if name == "triton":
        if not has_triton():
            raise ValueError("the triton backend needs triton and a CUDA device")
        from kernels.gpu.ops import TritonState

        return TritonState
    raise ValueError(f"unknown kernel backend {name!r}; known: {', '.join(BACKENDS)}")


def choose(device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs when none is named. Float64 takes plain torch everywhere.

    One that KERNELS_BACKEND names must be able to run on this machine, and takes only logits that it can.
    """
    wanted = settings().backend
    if wanted in ("reference", "torch"):
        return wanted
    if dtype == torch.float64:
        return "torch"
    if wanted is not None and (wanted == "triton") == (device.type == "cuda"):
        return wanted
    if device.type == "cuda" and has_triton():
        return "triton"
    if device.type == "cpu" and dtype in CPP_DTYPES and library() is not None:
        return "cpp"
    return "torch"


def available_backends() -> tuple[str, ...]:
    """Names of `BACKENDS` that can run on this machine."""
    there = {"cpp": library() is not None, "triton": has_triton()}
    return tuple(name for name in BACKENDS if there.get(name, True))


def open_state(logits: Tensor, params: RowParams, backend: str | None, updates: int | None) -> Guided:
    """The state class for these logits; `backend` None lets the dispatcher choose.

    Raises ValueError for an unknown name, or one that cannot run on these logits or this machine.
    """
    state = state_class(backend or choose(logits.device, logits.dtype))(logits, params, updates)
    if isinstance(state, TiledState) and logits.device.type == "cpu" and state.dtype == torch.float32:
        wanted = settings().cpu_products
        state.products = wanted if has_bfloat16_products() else torch.float32
    return state


def backend_info() -> dict[str, str]:
    """Op -> the implementation that runs for 32-bit and 16-bit logits on this machine's default device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return dict.fromkeys(OPS, choose(device, torch.float32))

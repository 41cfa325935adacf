"""Chooses the implementation of an operation on logits: by device, dtype and `kernels.settings`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from kernels.cpp.build import DTYPES, library
from kernels.cpp.ops import CppState
from kernels.ops import Guided, RowParams
from kernels.reference import ReferenceState
from kernels.roofline import BACKENDS as PRODUCTS
from kernels.roofline import estimate
from kernels.settings import BACKENDS, has_triton, settings, triton_trouble
from kernels.torch_ops import TorchState


def state_class(name: str) -> type[Guided]:
    """The state of a backend by name; ValueError for an unknown one."""
    if name in ("triton", "fused"):
        if not has_triton():
            raise ValueError(f"the {name} backend needs triton and a CUDA device")
        from kernels.gpu.fused import FusedState
        from kernels.gpu.ops import TritonState

        return FusedState if name == "fused" else TritonState
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
        if wanted.backend in ("triton", "fused"):
            return wanted.backend
        return "triton" if has_triton() else "torch"
    if device.type == "cpu" and dtype in DTYPES:
        return "cpp" if wanted.backend == "cpp" or library() is not None else "torch"
    return "torch"


class Products(NamedTuple):
    """The backend whose way through the vocabulary products is taken, and why it is."""

    backend: str
    why: str


def choose_products(
    wish: str, device: torch.device, dtype: torch.dtype, vocab_size: int, widths: Sequence[int], rows: int
) -> Products:
    """The backend for logits and tables of this dtype: `choose`, and where that is Triton, `fused` or the library's
    products, as the wish says or, for "auto", `kernels.roofline`.

    `widths` are D of the reward models' tables, `rows` N of what budgets let through at once: both are known when a
    server loads. ValueError for "fused" where it cannot run.
    """
    found = choose(device, dtype)
    if settings().backend == found:
        return Products(found, "KERNELS_BACKEND says so")
    if found != "triton" and wish != "fused":
        return Products(found, triton_trouble())
    possible = found == "triton" and dtype.itemsize == 2
    if wish == "fused" and not possible:
        lacks = triton_trouble() or f"it needs a CUDA device, triton and 16-bit weights, not {dtype} on {device}"
        raise ValueError(f"'fused' cannot run here: {lacks}")
    if wish != "auto":
        return Products(PRODUCTS[wish], "the setting says so")
    if not possible or not widths:
        return Products("triton", f"no reward model, or {dtype}, which tensor cores do not take")
    seconds = estimate(torch.cuda.get_device_capability(device), vocab_size, widths, rows)
    figures = f"{seconds.fused * 1e3:.2f} ms against the library's {seconds.library * 1e3:.2f}"
    return Products(PRODUCTS[seconds.takes], f"estimated for {rows} rows: fused {figures}")


def try_triton(device: torch.device) -> str:
    """Compiles and runs one pass there. Returns what failed (no C compiler, no Python headers, a driver too old), after
    which plain torch is chosen; nothing where all is well, or where triton would not run anyway."""
    if choose(device, torch.float32) not in ("triton", "fused"):
        return triton_trouble()
    column = torch.ones(2, device=device)
    params = RowParams(column, column, column.long(), column > 1, column)
    try:
        with torch.cuda.device(device):
            float(state_class("triton")(torch.zeros(2, 2, device=device), params, None).stats.lse_1.sum())
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return triton_trouble("triton does not run here: " + "; ".join(lines[:2]))
    return ""


def available_backends() -> tuple[str, ...]:
    """Names of `BACKENDS` that can run on this machine."""
    there = {"cpp": library() is not None, "triton": has_triton(), "fused": has_triton()}
    return tuple(name for name in BACKENDS if there.get(name, True))


def default_backend() -> str:
    """The backend that runs for 32-bit and 16-bit logits on this machine's default device."""
    return choose(torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.float32)

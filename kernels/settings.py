"""What the environment asks for and what this machine can do: all that decides which implementation runs.

Three environment variables change a choice, for tests and experiments on any machine:

* `KERNELS_BACKEND` names a backend of `kernels.BACKENDS` for all logits that it can take. "reference" and "torch" turn
  the C++ passes of attention and decoder blocks off as well.
* `KERNELS_BFLOAT16`, 1 or 0, says whether the processor counts as one that multiplies bfloat16 matrices natively.
  Unset, its flags tell. Torch computes these products on every processor, only slowly without the instructions.
* `KERNELS_CPP` says what the C++ passes are compiled for: "native" (this processor; the default), "baseline" (every
  processor of its architecture) or "off" (as if there were no compiler).

Nothing is ever chosen by a timing: the same machine and environment give the same tokens at every start.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass

import torch

BACKENDS = ("reference", "torch", "cpp", "triton", "fused")
_KNOWN = {
    "KERNELS_BACKEND": ("", *BACKENDS),
    "KERNELS_BFLOAT16": ("", "0", "1"),
    "KERNELS_CPP": ("", "native", "baseline", "off"),
}


@dataclass(frozen=True, slots=True)
class Settings:
    """The environment's wishes, and where it has none the machine's answer."""

    backend: str | None
    bfloat16: bool  # whether the processor multiplies bfloat16 matrices natively
    cpp: str  # "native", "baseline" or "off"

    @property
    def plain(self) -> bool:
        """Whether plain torch was asked for, and the compiled passes are off."""
        return self.backend in ("reference", "torch")


_current: Settings | None = None


def settings() -> Settings:
    """As the environment was at the first call: every pass asks, some thousand times a denoising step, so it is read
    once. Tests change it with `tests.support.kernels`. ValueError names the variable that holds something unknown."""
    global _current
    if _current is None:
        _current = _read()
    return _current


def _read() -> Settings:
    values = [os.environ.get(name, "") for name in _KNOWN]
    for (name, known), value in zip(_KNOWN.items(), values, strict=True):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; known: {', '.join(known[1:])}")
    backend, bfloat16, cpp = values
    native = bfloat16 == "1" if bfloat16 else not {"avx512_bf16", "amx_bf16"}.isdisjoint(" ".join(processor()).split())
    return Settings(backend or None, native, cpp or "native")


@functools.cache
def processor() -> tuple[str, ...]:
    """What Linux says of the processors' models and features, a line each; nothing elsewhere."""
    wanted = ("flags", "Features", "model name", "CPU part")
    try:
        with open("/proc/cpuinfo") as file:
            return tuple(sorted({line.strip() for line in file if line.startswith(wanted)}))
    except OSError:
        return ()


@functools.cache
def has_triton() -> bool:
    """Whether triton can be imported (it is not imported here), has something to run on, and has not failed there."""
    on = torch.cuda.is_available() or interpreted()
    return on and not _trouble and importlib.util.find_spec("triton") is not None


_trouble = ""


def triton_trouble(found: str | None = None) -> str:
    """Why triton does not run here although it could be imported, once `dispatch.try_triton` has found out; after that
    nothing chooses it."""
    global _trouble
    if found is not None:
        _trouble = found
        has_triton.cache_clear()
    return _trouble


def interpreted() -> bool:
    """Whether triton's interpreter runs the GPU kernels, on tensors of the CPU (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"

"""What a part of `make gpu-check` is, and how one runs. Needs no package but torch."""

from __future__ import annotations

import importlib
import os
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

Report = dict[str, Any]
"""Of a part: `tables` (rows by title), `text`, `wrong` (what is not as it must be), `left_out` (why it did not run)."""


@dataclass(frozen=True, slots=True)
class Part:
    """A function of a module, what it is for, and how many minutes it takes on a GPU."""

    name: str
    module: str
    minutes: float
    title: str


@dataclass(frozen=True, slots=True)
class Given:
    """What a part is told: the device, whether models are of real size, and for how many seconds it may run."""

    device: torch.device
    tiny: bool
    seconds: float


def run_here(part: Part, given: Given, sending: Connection) -> None:
    """A part in this process, which leads a group with whatever it starts; the report goes into the pipe."""
    os.setsid()
    torch.set_num_threads(min(torch.get_num_threads(), 8))
    if given.device.type == "cuda":
        torch.cuda.set_device(given.device)  # kernels are launched on the current one, whatever their tensors are on
    report: Report
    try:
        module = importlib.import_module(f"benchmarks.gpu.{part.module}")
        report = getattr(module, part.name)(given)
    except ModuleNotFoundError as error:
        report = {"left_out": f"the package {error.name} is missing"}
    except Exception as error:
        lines = traceback.format_exc().strip().splitlines()
        report = {"wrong": [f"{type(error).__name__}: {error}"], "text": "\n".join(lines[-30:])}
    sending.send(report)
    sending.close()

"""Whether NVIDIA GPUs are there that torch cannot use, and why: what the log and `server.doctor` say about it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

VENDOR, DISPLAY = "0x10de", "0x03"  # of PCI: NVIDIA, and the class of all that can show or compute pictures
LEAST_DRIVER = {12: 525, 13: 580}
"""The first driver for each major version of CUDA that torch is built for."""


def gpus(*, root: Path = Path("/")) -> int:
    """How many NVIDIA GPUs the machine has, as Linux tells it, also to a container that was given none; 0 elsewhere."""
    devices = root.glob("sys/bus/pci/devices/*")
    return sum(_read(each / "vendor") == VENDOR and _read(each / "class").startswith(DISPLAY) for each in devices)


def driver(*, root: Path = Path("/")) -> str | None:
    """The version of the driver that is loaded, as 580.65.06; None without one."""
    found = re.search(r"Kernel Module.*?(\d+\.\d+(\.\d+)?)", _read(root / "proc/driver/nvidia/version"))
    return None if found is None else found[1]


def why_unused(*, root: Path = Path("/")) -> str:
    """Why torch sees none of the GPUs that are there, and what to do; nothing where it sees one, there are none, or
    CUDA_VISIBLE_DEVICES hides them."""
    if torch.cuda.is_available() or not gpus(root=root) or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return ""
    built, loaded = torch.version.cuda, driver(root=root)
    if built is None:
        return f"torch {torch.__version__} is a build for CPUs: install its CUDA build"
    least = LEAST_DRIVER.get(int(built.partition(".")[0]), 0)
    if loaded is None:
        return f"no driver is loaded here: install NVIDIA's driver {least} or newer, or give the container its GPUs"
    if int(loaded.partition(".")[0]) < least:
        return f"driver {loaded} is too old for torch's CUDA {built}: install {least} or newer"
    return f"torch's CUDA {built} does not start with driver {loaded}: `torch.cuda.init()` says why"


def _read(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""

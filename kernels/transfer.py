"""From the host to a device without waiting for it, and back with one wait for all that is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def upload(x: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """x on the device, in `dtype`. To a GPU it goes through page-locked memory, which torch keeps for reuse: from
    ordinary memory the host would wait until everything that the GPU has to do before is done."""
    device = torch.device(device)
    if dtype is not None:
        x = x.to(dtype)
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def download(tensors: Sequence[Tensor | None]) -> list[Any]:
    """Each tensor as a numpy array, None as None; those of a CPU share its memory. The host waits once for all that is
    on a GPU, not once for each."""
    copies, devices = [], set()
    for x in tensors:
        if x is not None and x.device.type == "cuda":
            devices.add(x.device)
            x = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
        copies.append(x)
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    return [None if x is None else x.numpy(force=True) for x in copies]

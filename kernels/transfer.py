"""From the host to a device without waiting for it."""

from __future__ import annotations

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

"""From the host to a device without waiting for it, and back with one wait for all that is wanted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

ALIGNED = 16
"""Bytes at which each of several tensors in one buffer begins: kernels are compiled for addresses that divide by it."""


def upload(x: Tensor, device: torch.device | str) -> Tensor:
    """x on the device. To a GPU it goes through page-locked memory, which torch keeps for reuse: from ordinary memory
    the host would wait until everything that the GPU has to do before is done."""
    device = torch.device(device)
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def upload_all(things: Sequence[Any], device: torch.device | str) -> list[Any]:
    """Tensors, dataclasses with tensors among their fields, and None, with all tensors that are on the host on the
    device: in one copy, however many there are. On a CPU they are what they were."""
    device = torch.device(device)
    if device.type == "cpu":
        return list(things)
    held = [_tensors(thing) for thing in things]
    distinct = list({id(x): x for each in held for x in each.values() if x.device.type == "cpu"}.values())
    if not distinct:
        return list(things)
    size = sum(map(_room, distinct))
    together = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for place, x in zip(_places(together, distinct), distinct, strict=True):
        place.copy_(x)
    there = _places(together.to(device, non_blocking=True), distinct)
    sent = {id(x): place for x, place in zip(distinct, there, strict=True)}
    found = []
    for thing, tensors in zip(things, held, strict=True):
        new = {name: sent.get(id(x), x) for name, x in tensors.items()}
        found.append(new[""] if "" in new else dataclasses.replace(thing, **new) if new else thing)
    return found


def _tensors(thing: Any) -> dict[str, Tensor]:
    """A dataclass's tensors by field; a tensor itself by the empty name."""
    if thing is None or isinstance(thing, Tensor):
        return {} if thing is None else {"": thing}
    named = {field.name: getattr(thing, field.name) for field in dataclasses.fields(thing)}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def _room(x: Tensor) -> int:
    """Bytes of a buffer that a tensor takes."""
    return -(-x.nbytes // ALIGNED) * ALIGNED


def _places(buffer: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The places in a buffer of bytes of tensors like these, one after another."""
    pieces = buffer.split_with_sizes([_room(x) for x in tensors])
    return [piece[: x.nbytes].view(x.dtype).view(x.shape) for piece, x in zip(pieces, tensors, strict=True)]


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

"""Which variant runs, and with which blocks: a table that is measured, not guessed.

`choices.json` holds rows that `benchmarks.kernels --tune` wrote on a GPU. A row applies to a device capability,
a table dtype and up to a number of rows and a hidden size. Without a row that fits, the library matrix product with
the elementwise kernel beside it runs: it is the variant with the least to go wrong.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("choices.json")


@dataclass(frozen=True, slots=True)
class Choice:
    """Variants ("library" or "fused") and block sizes; the defaults compile without spills for sm_80, sm_90, sm_100."""

    forward: str = "library"
    update: str = "library"
    update_rows: int = 128
    update_depth: int = 64
    update_pieces: int = 4  # twice as many where two gradients are read, or phi is written
    update_warps: int = 8
    update_stages: int = 3
    forward_rows: int = 64
    forward_hidden: int = 128
    forward_columns: int = 16
    forward_warps: int = 8
    forward_stages: int = 2
    programs: int = 264  # what the fused forward splits the vocabulary for: two a multiprocessor


@functools.cache
def table() -> tuple[dict[str, Any], ...]:
    """The measured rows, in order."""
    rows: list[dict[str, Any]] = json.loads(TABLE.read_text())["rows"]
    return tuple(rows)


_forced: ContextVar[Choice | None] = ContextVar("forced", default=None)


@contextlib.contextmanager
def forced(choice: Choice) -> Iterator[None]:
    """Every launch inside uses this choice, whatever the table says; for measuring and testing variants."""
    token = _forced.set(choice)
    try:
        yield
    finally:
        _forced.reset(token)


def choose(device: torch.device, dtype: torch.dtype, rows: int, vocab_size: int, hidden: int) -> Choice:
    """The forced choice, else the first measured row that fits these N, V and D, else the defaults."""
    return _forced.get() or _look_up(device, dtype, rows, vocab_size, hidden)


@functools.lru_cache(maxsize=1024)
def _look_up(device: torch.device, dtype: torch.dtype, rows: int, vocab_size: int, hidden: int) -> Choice:
    capability = list(torch.cuda.get_device_capability(device)) if device.type == "cuda" else None
    for row in table():
        fits = (
            row["capability"] == capability
            and row["dtype"] == str(dtype).removeprefix("torch.")
            and rows <= row["rows_at_most"]
            and hidden <= row["hidden_at_most"]
        )
        if fits:
            return Choice(**row["choice"])
    return Choice()

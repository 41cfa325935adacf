"""What the environment asks of the kernels, for one test."""

from __future__ import annotations

import pytest


def choose_kernels(monkeypatch: pytest.MonkeyPatch, **wishes: str) -> None:
    """Set environment variables, by their names after `KERNELS_`, and have them read; "" is as if it were not set."""
    for name, value in wishes.items():
        monkeypatch.setenv(f"KERNELS_{name}", value)
    monkeypatch.setattr("kernels.settings._current", None)

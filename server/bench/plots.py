"""Plots of what the benchmarks found, from their JSON: `python -m server.bench.plots build/bench/offline.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def draw(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw every plot that the document has data for, as PNG and SVG; returns the files."""
    return []

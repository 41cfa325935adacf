"""How a benchmark's findings are shown: tables for people, one JSON line for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]

HIDDEN = frozenset({"repetitions", "tokens", "seconds_by_phase", "gflop_by_phase", "utilisation_by_phase"})
HIDDEN |= {"method", "in_flight", "share", "rate"}
"""Keys of a row that are only in the JSON line: they have a table of their own, or the row's name says the same."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One number that a case is run for, and the bound it should hold, if any: `at_least` or `at_most`."""

    name: str
    value: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the bound holds; None without one."""
        if self.at_least is not None:
            return self.value >= self.at_least
        return None if self.at_most is None else self.value <= self.at_most


@dataclass(frozen=True, slots=True)
class CaseResult:
    """What one case found: rows for its table, its figures, and the machine's matrix-product rate where it matters."""

    case: str
    rows: list[Row]
    figures: list[Figure] = field(default_factory=list)
    gemm_gflops: float | None = None

    def to_json(self) -> Row:
        """The case as plain values."""
        return asdict(self) | {"figures": [asdict(figure) | {"met": figure.met} for figure in self.figures]}


def number(value: Any) -> str:
    """Three significant digits, without exponents where people read seconds and rates; everything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.0f}"
    return f"{value:.3g}"


def table(title: str, rows: Sequence[Row]) -> Table:
    """One line a row; the columns are all keys that any row has, in order of appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in HIDDEN))
    shown = Table(title=title, title_justify="left")
    for column in columns:
        text = any(isinstance(row.get(column), str) for row in rows)
        shown.add_column(column.replace("_", " "), justify="left" if text else "right")
    for row in rows:
        shown.add_row(*(number(row[column]) if column in row else "" for column in columns))
    return shown


def phase_table(title: str, rows: Sequence[Row]) -> Table | None:
    """Share of the time by phase, and the utilisation inside it; None where no row has phases."""
    timed = [row for row in rows if row.get("seconds_by_phase")]
    if not timed:
        return None
    names = list(timed[0]["seconds_by_phase"])
    shown = Table(title=title, title_justify="left")
    shown.add_column("variant")
    for name in names:
        shown.add_column(name, justify="right")
    for row in timed:
        seconds, inside = row["seconds_by_phase"], row.get("utilisation_by_phase", {})
        total = sum(seconds.values())
        cells = []
        for name in names:
            share = f"{100 * seconds[name] / total:.0f}%"
            cells.append(f"{share} at {inside[name]:.2f}" if inside.get(name) else share)
        shown.add_row(str(row["variant"]), *cells)
    return shown


def figure_table(figures: Sequence[Figure]) -> Table:
    """What was to be shown, and whether it was."""
    shown = Table("figure", title="Figures", title_justify="left")
    shown.add_column("value", justify="right")
    shown.add_column("bound", justify="right")
    shown.add_column("met")
    for figure in figures:
        bound = "" if figure.at_most is None else f"<= {number(figure.at_most)}"
        bound = bound if figure.at_least is None else f">= {number(figure.at_least)}"
        shown.add_row(figure.name, number(figure.value), bound, {True: "yes", False: "NO", None: ""}[figure.met])
    return shown


def show(cases: Sequence[CaseResult], console: Console) -> None:
    """All tables of a benchmark's cases."""
    for case in cases:
        rate = "" if case.gemm_gflops is None else f" (GEMM rate {case.gemm_gflops:.0f} GFLOP/s)"
        console.print(table(case.case + rate, case.rows))
        phases = phase_table(f"{case.case}: time by phase, and utilisation inside it", case.rows)
        if phases is not None:
            console.print(phases)
    figures = [figure for case in cases for figure in case.figures]
    if figures:
        console.print(figure_table(figures))


def keep(document: Row, cases: Sequence[CaseResult], folder: Path) -> Row:
    """`document` with its cases, which is also written to `<bench>.json` in `folder`, for the plots."""
    whole = document | {"cases": [case.to_json() for case in cases]}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{document['bench']}.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return whole

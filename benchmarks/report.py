"""How a benchmark's findings are shown: tables for people, one JSON line for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Row = Mapping[str, Any]

HIDDEN = {"repetitions", "tokens", "seconds_by_phase", "gflop_by_phase", "utilisation_by_phase"}
"""Only in the JSON line, or in a table of their own."""


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


def phase_table(title: str, rows: Sequence[Row], label: str) -> Table | None:
    """Share of the time by phase, and the utilisation inside it; None where no row has phases."""
    timed = [row for row in rows if row.get("seconds_by_phase")]
    if not timed:
        return None
    names = list(timed[0]["seconds_by_phase"])
    shown = Table(title=title, title_justify="left")
    shown.add_column(label)
    for name in names:
        shown.add_column(name, justify="right")
    for row in timed:
        seconds, inside = row["seconds_by_phase"], row.get("utilisation_by_phase", {})
        total = sum(seconds.values())
        cells = []
        for name in names:
            share = f"{100 * seconds[name] / total:.0f}%"
            cells.append(f"{share} at {inside[name]:.2f}" if inside.get(name) else share)
        shown.add_row(str(row[label]), *cells)
    return shown


def figure_table(figures: Sequence[Row]) -> Table:
    """What was to be shown, and whether it was."""
    shown = Table("figure", title="Figures", title_justify="left")
    shown.add_column("value", justify="right")
    shown.add_column("bound", justify="right")
    shown.add_column("met")
    for figure in figures:
        bound = ""
        if figure["at_least"] is not None:
            bound = f">= {number(figure['at_least'])}"
        elif figure["at_most"] is not None:
            bound = f"<= {number(figure['at_most'])}"
        met = {True: "yes", False: "NO", None: ""}[figure["met"]]
        shown.add_row(figure["name"], number(figure["value"]), bound, met)
    return shown


def show(document: Mapping[str, Any], console: Console) -> None:
    """All tables of a benchmark's document (see `write`)."""
    for case in document["cases"]:
        console.print(table(f"{case['case']} (GEMM rate {case['gemm_gflops']:.0f} GFLOP/s)", case["rows"]))
        label = "variant"
        phases = phase_table(f"{case['case']}: time by phase, and utilisation inside it", case["rows"], label)
        if phases is not None:
            console.print(phases)
    figures = [figure for case in document["cases"] for figure in case["figures"]]
    if figures:
        console.print(figure_table(figures))


def write(document: Mapping[str, Any], folder: Path) -> Path:
    """Keep the document as `<bench>.json` in `folder`, for the plots."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{document['bench']}.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return path

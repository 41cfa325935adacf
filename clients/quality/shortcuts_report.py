"""The comparison of inexact options as a table, JSON, Markdown and a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clients.quality.intervals import Interval
from clients.quality.report import markdown_table, text_table
from clients.quality.shortcuts import Row

HEADER = (
    "option",
    "steps",
    "model calls",
    "reward calls",
    "time",
    "Top@1",
    "change",
    "Avg@N",
    "change",
    "nll change",
    "fluent",
)
COLOURS = {
    "reference": "#333333",
    "entropy_bound": "#1f5fa8",
    "threshold": "#2a8a5d",
    "window": "#c46a1c",
    "steps": "#8a2a7d",
    "both": "#b02a37",
}


def cells(row: Row) -> tuple[str, ...]:
    """A row as text."""
    ratio, low, high = row.time
    return (
        row.option.name,
        f"{row.steps:.1f}",
        f"{row.model_calls:.1f}",
        f"{row.reward_calls:.1f}",
        f"{ratio:.2f} [{low:.2f}, {high:.2f}]",
        str(row.top),
        signed(row.top_change),
        str(row.average),
        signed(row.average_change),
        signed(row.nll_change),
        f"{row.fluent[0]:.0%}",
    )


def signed(change: Interval) -> str:
    """A paired difference with its sign."""
    return f"{change.mean:+.2f} ± {change.half:.2f}"


def shortcuts_text(reward_model: str, rows: Sequence[Row]) -> str:
    """The table for a terminal."""
    return f"reward model {reward_model}\n" + text_table(HEADER, [cells(row) for row in rows])


def shortcuts_json(reward_model: str, rows: Sequence[Row]) -> dict[str, Any]:
    """The same figures for machines: [mean, half] of intervals, [value, low, high] of time and fluency."""
    listed = [
        {
            "option": row.option.name,
            "kind": row.option.kind,
            "approximations": list(row.approximations),
            **{name: round(getattr(row, name), 3) for name in ("steps", "model_calls", "reward_calls")},
            **{name: [round(value, 4) for value in getattr(row, name)] for name in ("time", "fluent")},
            **{
                name: [round(getattr(row, name).mean, 4), round(getattr(row, name).half, 4)]
                for name in ("top", "top_change", "average", "average_change", "nll", "nll_change")
            },
        }
        for row in rows
    ]
    return {"reward_model": reward_model, "rows": listed}


def write(folder: Path, reward_model: str, rows: Sequence[Row]) -> None:
    """shortcuts-NAME.md, .json and .svg."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"shortcuts-{reward_model}"
    table = markdown_table(HEADER, [cells(row) for row in rows])
    (folder / f"{stem}.md").write_text(f"{table}\n\n![Reward against time]({stem}.svg)\n", encoding="utf-8")
    document = json.dumps(shortcuts_json(reward_model, rows))
    (folder / f"{stem}.json").write_text(document + "\n", encoding="utf-8")
    draw(reward_model, rows, folder / f"{stem}.svg")


def draw(reward_model: str, rows: Sequence[Row], file: Path) -> None:
    """Changes of Top@1 and of the judge's nats a token, against time. The ending of `file` is the format."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 1, figsize=(9, 10), sharex=True, layout="constrained")
    for axes, name, label in (
        (panels[0], "top_change", f"Top@1 under {reward_model}, change to exact"),
        (panels[1], "nll_change", "SmolLM2 nats a token, change to exact (lower: more fluent)"),
    ):
        for row in rows:
            change: Interval = getattr(row, name)
            colour, (ratio, low, high) = COLOURS[row.option.kind], row.time
            axes.errorbar(
                ratio,
                change.mean,
                xerr=[[ratio - low], [high - ratio]],
                yerr=change.half,
                fmt="o",
                color=colour,
                elinewidth=0.7,
                alpha=0.85,
            )
            axes.annotate(
                row.option.name, (ratio, change.mean), (4, 4), textcoords="offset points", fontsize=7, color=colour
            )
        axes.axhline(0, color="#bbbbbb", linewidth=0.8)
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
    panels[1].set_xlabel("time of a round of requests, exact = 1")
    panels[0].set_xlim(left=0)
    figure.savefig(file)
    plt.close(figure)

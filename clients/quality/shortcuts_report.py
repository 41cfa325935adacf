"""The comparison of inexact options as a table, JSON, Markdown and a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clients.quality.intervals import Interval
from clients.quality.report import markdown_table, text_table
from clients.quality.shortcuts import EXACT, Row

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
    (folder / f"{stem}.md").write_text(f"{table}\n\n![Costs and gains by option]({stem}.svg)\n", encoding="utf-8")
    document = json.dumps(shortcuts_json(reward_model, rows))
    (folder / f"{stem}.json").write_text(document + "\n", encoding="utf-8")
    draw(reward_model, rows, folder / f"{stem}.svg")


def draw(reward_model: str, rows: Sequence[Row], file: Path) -> None:
    """A line an option: time and counted calls, changes of Top@1 and of the judge's nats a token. The ending of `file`
    is the format."""
    import matplotlib.pyplot as plt

    exact = next(row for row in rows if row.option.name == EXACT)
    figure, (gains, rewards, fluency) = plt.subplots(
        1, 3, figsize=(13, 0.8 + 0.3 * len(rows)), sharey=True, layout="constrained"
    )
    for y, row in enumerate(rows):
        colour, (ratio, low, high) = COLOURS[row.option.kind], row.time
        style = {"fmt": "o", "markersize": 4, "color": colour, "elinewidth": 1.0}
        gains.errorbar(ratio, y, xerr=[[ratio - low], [high - ratio]], **style)
        gains.plot(row.model_calls / exact.model_calls, y - 0.2, "|", color=colour)
        gains.plot(row.reward_calls / exact.reward_calls, y - 0.2, "x", markersize=4, color=colour)
        for axes, change in ((rewards, row.top_change), (fluency, row.nll_change)):
            axes.errorbar(change.mean, y, xerr=change.half, **style)
    gains.set_yticks(range(len(rows)), [row.option.name for row in rows])
    gains.invert_yaxis()
    gains.set_xlim(0, 1.6)
    gains.set_xlabel("dot: time, bar: model calls, cross: reward calls")
    rewards.set_xlabel(f"Top@1 under {reward_model}, change to exact")
    fluency.set_xlabel("SmolLM2 nats a token, change (right: less fluent)")
    for axes, reference in ((gains, 1), (rewards, 0), (fluency, 0)):
        axes.axvline(reference, color="#bbbbbb", linewidth=0.8, zorder=0)
        axes.grid(axis="x", alpha=0.25)
    figure.savefig(file)
    plt.close(figure)

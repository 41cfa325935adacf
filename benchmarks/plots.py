"""Plots of what the benchmarks found, from their JSON: `python -m benchmarks.plots build/bench/offline.json`.

Every plot is drawn from the rows of one case, as PNG (to look at) and SVG (for documents). Cases that a document lacks
are left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

Rows = Sequence[Mapping[str, Any]]

# Okabe and Ito's palette: distinct for the colour-blind, and in grey.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#999999"
PHASES = {"diffusion": BLUE, "vocabulary": ORANGE, "reward forward": GREEN, "reward backward": PURPLE, "rest": GREY}
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "figure.dpi": 110,
    "svg.hashsalt": "bench",  # the same data give the same file
}
METHOD_COLOURS = {"entrgi": BLUE, "none": ORANGE}
QUANTILES = {"p50": "o-", "p95": "s--"}
SWEEP_TITLES = {
    "T": "steps T",
    "M": "gradient steps M",
    "K": "trajectories K",
    "prompts": "prompts",
    "L": "response tokens L (T = L / 2)",
    "prompt words": "words of the prompt",
}


def concurrency(rows: Rows) -> Figure:
    """Tokens/s against requests at once, guided and not; dashed, the plain loop."""
    figure = Figure(figsize=(5.6, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, colour in METHOD_COLOURS.items():
        mine = [row for row in rows if row["method"] == name]
        at_once = [row["at_once"] for row in mine]
        axes.plot(at_once, [row["tokens_per_s"] for row in mine], "o-", color=colour, label=f"engine, {name}")
        axes.axhline(mine[0]["plain_tokens_per_s"], color=colour, ls="--", lw=1, label=f"plain loop, {name}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted({row["at_once"] for row in rows}))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(FuncFormatter(_some))
    axes.set(xlabel="requests at once (K = 1)", ylabel="tokens/s", title="Throughput against concurrency")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _some(value: float, _: int | None) -> str:
    """Labels of minor ticks on a logarithmic axis: 2 and 5 of every decade."""
    leading = f"{value:e}"[0]
    return f"{value:g}" if leading in "25" else ""


def phases(rows: Rows) -> Figure:
    """Share of the time by phase, one bar a row."""
    timed = [row for row in rows if row.get("seconds_by_phase")]
    figure = Figure(figsize=(7.2, 1.1 + 0.42 * len(timed)), layout="constrained")
    axes = figure.subplots()
    left = np.zeros(len(timed))
    places = np.arange(len(timed))
    for name, colour in PHASES.items():
        share = np.array([100 * row["seconds_by_phase"][name] / sum(row["seconds_by_phase"].values()) for row in timed])
        axes.barh(places, share, left=left, color=colour, label=name, height=0.62)
        for place, (start, part) in enumerate(zip(left, share, strict=True)):
            if part >= 6:
                axes.text(start + part / 2, place, f"{part:.0f}", ha="center", va="center", color="white", fontsize=8)
        left += share
    axes.set_yticks(places, [row["variant"] for row in timed])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="% of the time", xlim=(0, 100))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(PHASES))
    return figure


def linear(rows: Rows) -> Figure:
    """Seconds against each swept quantity, with the straight line through the points."""
    figure = Figure(figsize=(9.2, 5.4), layout="constrained")
    panels = figure.subplots(2, 3).ravel()
    for axes, (sweep, title) in zip(panels, SWEEP_TITLES.items(), strict=True):
        mine = [row for row in rows if row.get("sweep") == sweep]
        x = np.array([row["x"] for row in mine], dtype=float)
        seconds = np.array([row["least_seconds"] for row in mine])
        axes.plot(x, seconds, "o", color=BLUE, label="wall")
        axes.plot(x, [row["cpu_seconds"] for row in mine], "x", color=GREY, label="CPU")
        if sweep == "T":
            flat = max(row["x"] for row in mine) / 4
            _line(axes, x[x <= flat], seconds[x <= flat])
            axes.axvline(flat, color=GREY, ls=":", lw=1)
            axes.annotate("T = L", (flat, 0), xytext=(4, 40), textcoords="offset points", color="#666666")
        elif sweep not in ("L", "prompt words"):
            _line(axes, x, seconds)
        else:
            axes.plot(x, seconds, "-", color=BLUE, lw=1)
        if sweep == "prompt words":
            names = ("reward forward", "reward backward")
            reward = [sum(row["seconds_by_phase"][name] for name in names) for row in mine]
            axes.plot(x, reward, "s-", color=GREEN, lw=1, ms=4, label="reward model, wall")
        axes.set(xlabel=title, ylabel="seconds", ylim=(0, None), xlim=(0, None))
        if sweep in ("T", "prompt words"):
            axes.legend(fontsize=8)
    return figure


def _line(axes: Axes, x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> None:
    slope, intercept = np.polyfit(x, y, 1)
    ends = np.array([0.0, x.max()])
    axes.plot(ends, slope * ends + intercept, "-", color=BLUE, lw=1)


def ablation(rows: Rows) -> Figure:
    """Times slower without each saving."""
    mine = [row for row in rows if not row["variant"].startswith("all, beside")]
    figure = Figure(figsize=(6.4, 1.0 + 0.42 * len(mine)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(mine))
    for offset, key, colour, label in (
        (-0.19, "times_slower", BLUE, "wall time"),
        (0.19, "cpu_times_slower", GREY, "CPU time"),
    ):
        values = [row[key] for row in mine]
        bars = axes.barh(places + offset, values, height=0.36, color=colour, label=label)
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axes.axvline(1.0, color="black", lw=0.8)
    axes.set_yticks(places, [row["variant"].replace("_", " ") for row in mine])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.12)
    axes.set(xlabel="times slower than with all savings")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def method(rows: Rows) -> Figure:
    """Tokens/s by method, engine and plain loop."""
    figure = Figure(figsize=(6.0, 3.6), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(rows))
    for offset, key, colour, label in (
        (-0.19, "tokens_per_s", BLUE, "engine"),
        (0.19, "plain_tokens_per_s", GREY, "plain loop"),
    ):
        bars = axes.bar(places + offset, [row[key] for row in rows], width=0.36, color=colour, label=label)
        axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=8)
    axes.set_xticks(places, [row["variant"] for row in rows])
    axes.grid(axis="x", visible=False)
    axes.set(ylabel="tokens/s", title="Throughput by method")
    axes.margins(y=0.12)
    axes.legend()
    return figure


def closed(rows: Rows) -> Figure:
    """Over HTTP: tokens/s, and the time of a whole answer, against requests in flight."""
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, colour in METHOD_COLOURS.items():
        mine = [row for row in rows if row["method"] == name]
        in_flight = [row["in_flight"] for row in mine]
        left.plot(in_flight, [row["tokens_per_s"] for row in mine], "o-", color=colour, label=name)
        for quantile, style in QUANTILES.items():
            label = f"{name}, {quantile}"
            right.plot(in_flight, [row[f"latency_{quantile}"] for row in mine], style, color=colour, label=label)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({row["in_flight"] for row in rows}))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set(xlabel="requests in flight", ylim=(0, None))
        axes.legend()
    left.set(ylabel="tokens/s", title="Throughput over HTTP")
    right.set(ylabel="seconds", title="Time of an answer")
    return figure


def opened(rows: Rows) -> Figure:
    """Over HTTP: percentiles against the rate of arrivals, as a share of what the closed loop got done."""
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, (key, title) in zip(
        panels, {"first_text": "Time to the first text", "latency": "Time of an answer"}.items(), strict=True
    ):
        for name, colour in METHOD_COLOURS.items():
            mine = [row for row in rows if row["method"] == name and f"{key}_p50" in row]
            for quantile, style in QUANTILES.items():
                seconds = [row[f"{key}_{quantile}"] for row in mine]
                axes.plot(
                    [100 * row["share"] for row in mine], seconds, style, color=colour, label=f"{name}, {quantile}"
                )
        axes.set(xlabel="arrivals, % of the closed loop's throughput", ylabel="seconds", title=title, ylim=(0, None))
    panels[1].legend()
    return figure


def simulated(x: str, by: str, titles: Mapping[str, str]) -> Callable[[Rows], Figure]:
    """Of simulated replicas: a panel for each key of `titles`, against `x`, with a line for each value of `by`."""

    def make(rows: Rows) -> Figure:
        figure = Figure(figsize=(4.2 * len(titles), 3.6), layout="constrained")
        panels = figure.subplots(1, len(titles))
        for axes, (key, title) in zip(panels, titles.items(), strict=True):
            for value in dict.fromkeys(row[by] for row in rows):
                mine = [row for row in rows if row[by] == value]
                axes.plot(
                    [row[x] for row in mine], [row[key] for row in mine], "o-", label=f"{by} {value}".replace("_", " ")
                )
            if x != "share":
                axes.set_xscale("log", base=2)
                axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.set(xlabel=x.replace("_", " "), title=f"{title} (simulated)", ylim=(0, None))
        panels[-1].legend()
        return figure

    return make


LATENCIES = {"latency_p50": "Time of an answer, p50, s", "latency_p99": "Time of an answer, p99, s"}

PLOTS: dict[str, dict[str, Callable[[Rows], Figure]]] = {
    "headline": {"phases": phases},
    "unguided": {"unguided-phases": phases},
    "concurrency": {"concurrency": concurrency},
    "linear": {"linear": linear},
    "ablation": {"ablation": ablation},
    "method": {"method": method, "method-phases": phases},
    "closed": {"online-closed": closed},
    "open": {"online-open": opened},
    "replicas": {
        "simulated-replicas": simulated("replicas", "policy", LATENCIES | {"fairness": "Fairness of slowdowns"})
    },
    "budgets": {
        "simulated-budgets": simulated("in_flight", "batch_trajectories", {"tokens_per_s": "Tokens/s"} | LATENCIES)
    },
    "load": {"simulated-load": simulated("share", "burstiness", LATENCIES | {"has": "Requests that it has"})},
    "sizes": {"simulated-sizes": simulated("replicas", "reward", {"tokens_per_s": "Tokens/s"} | LATENCIES)},
}
"""Case -> the names of its plots and how they are drawn."""


def draw(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw every plot that the document has data for, as PNG and SVG in `folder`; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with rc_context(STYLE):
        for case in document["cases"]:
            for name, make in PLOTS.get(case["case"], {}).items():
                figure = make(case["rows"])
                for kind in ("png", "svg"):
                    path = folder / f"{name}.{kind}"
                    figure.savefig(path, metadata={"Date": None} if kind == "svg" else None)
                    written.append(path)
    return written


def main() -> None:
    """Draw the plots of documents that a benchmark wrote, beside them or in `--out`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", nargs="+", type=Path, metavar="JSON")
    parser.add_argument("--out", type=Path, help="default: each document's own folder")
    args = parser.parse_args()
    for path in args.documents:
        document = json.loads(path.read_text(encoding="utf-8"))
        for drawn in draw(document, args.out or path.parent):
            print(drawn)


if __name__ == "__main__":
    main()

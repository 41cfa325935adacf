"""The plots of a study, as SVG that holds its text as text."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .study import HEADLINE, Outcome

COLOURS = {
    "none": "#777777", "bon": "#c46a1c", "smc": "#b8231f", "expectation": "#2a8a5d", "aps": "#8a2a7d",
    "entrgi": "#1f5fa8", "entrgi+smc": "#0d8a94",
}  # fmt: skip
OTHER = "#333333"
MARKERS = "osD^vP*X"


def plots_of(outcome: Outcome) -> dict[str, str]:
    """All plots that the outcome has something for, by name."""
    drawn = {"reward-against-compute": compute(outcome), "rewards": rewards(outcome)}
    return drawn | ({"reward-over-steps": steps(outcome.curves)} if outcome.curves else {})


def _draw(panels: int, height: float, paint: Callable[[Sequence[Any]], None]) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "study", "font.size": 9}):
        figure = Figure(figsize=(4.8 * panels, height), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
        paint(axes)
        for each in axes:
            each.grid(alpha=0.25)
            each.spines[["top", "right"]].set_visible(False)
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    return written.getvalue()


def _style(outcome: Outcome) -> dict[str, tuple[str, str]]:
    """A colour by method and a marker by series, which differ where a method has several."""
    methods = {each.series: each.method for each in outcome.settings}
    return {
        series: (COLOURS.get(method, OTHER), MARKERS[[*methods].index(series) % len(MARKERS)])
        for series, method in methods.items()
    }


def compute(outcome: Outcome) -> str:
    """Top@1 against operations and against seconds; points of one series, which differ in K alone, are joined and bear
    their K. Where the networks' sizes are not known, there are no operations."""
    style = _style(outcome)
    known = {measure for found in outcome.measures.values() for measure in found}
    panels = {"GFLOPs": "GFLOP of both networks a request", "seconds": "seconds a request"}
    panels = {measure: label for measure, label in panels.items() if measure in known}

    def paint(axes: Sequence[Any]) -> None:
        for panel, (measure, label) in zip(axes, panels.items(), strict=True):
            for series, (colour, marker) in style.items():
                own = [each for each in outcome.settings if each.series == series]
                own = [each for each in own if measure in outcome.measures.get(each.name, ())]
                own.sort(key=lambda each: each.best_of)
                found = [outcome.measures[each.name] for each in own]
                x, y = [row[measure].mean for row in found], [row[HEADLINE] for row in found]
                bars = [[at.mean - at.low for at in y], [at.high - at.mean for at in y]]
                line = {"fmt": f"{marker}-", "color": colour, "elinewidth": 1, "capsize": 2}
                panel.errorbar(x, [at.mean for at in y], yerr=bars, label=series, **line)
                for each, *at in zip(own, x, (at.mean for at in y), strict=True):
                    panel.annotate(f"{each.best_of}", at, (4, 4), textcoords="offset points", color=colour)
            panel.set_xlim(left=0)
            panel.set_xlabel(label)
        axes[0].set_ylabel("reward of the answer (Top@1)")
        axes[-1].legend(frameon=False, loc="lower right")

    return _draw(len(panels), 3.6, paint)


def rewards(outcome: Outcome) -> str:
    """Top@1 and Avg@N of each setting with their intervals."""
    names = [each.name for each in outcome.settings if each.name in outcome.measures]

    def paint(axes: Sequence[Any]) -> None:
        (panel,) = axes
        for offset, measure, colour in ((-0.12, "Top@1", COLOURS["entrgi"]), (0.12, "Avg@N", COLOURS["bon"])):
            found = [outcome.measures[name][measure] for name in names]
            means = [each.mean for each in found]
            bars = [[each.mean - each.low for each in found], [each.high - each.mean for each in found]]
            rows = [row + offset for row in range(len(names))]
            panel.errorbar(means, rows, xerr=bars, fmt="o", markersize=4, color=colour, label=measure, elinewidth=1)
        panel.set_yticks(range(len(names)), names)
        panel.invert_yaxis()
        panel.set_xlabel("reward")
        panel.legend(frameon=False)

    return _draw(1, 1.2 + 0.32 * len(names), paint)


def steps(curves: Mapping[str, Sequence[float]]) -> str:
    """The mean reward of the current estimate after each step."""

    def paint(axes: Sequence[Any]) -> None:
        (panel,) = axes
        for name, values in curves.items():
            panel.plot(range(1, len(values) + 1), values, color=COLOURS.get(name.partition(" ")[0], OTHER), label=name)
        panel.set_xlabel("denoising step")
        panel.set_ylabel("mean reward")
        panel.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))

    return _draw(1, 3.0, paint)

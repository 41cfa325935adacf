"""Tables for the terminal, Markdown and an SVG plot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clients.quality.compare import Comparison, Row
from clients.quality.fluency import FluencyReport
from clients.quality.intervals import Interval

HEADER = ("reward model", "method", "Top@1", "Avg@N", "VADER", "SmolLM2 nll", "words", "empty")
COLOURS = {"Top@1": "#1f5fa8", "Avg@N": "#c46a1c"}


def cells(row: Row) -> tuple[str, ...]:
    """A row of the comparison as text."""
    values = (row.top, row.average, row.judge, row.nll, row.words)
    return (row.reward_model, row.method, *(str(value) for value in values), str(row.empty))


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell."""
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in (header, *rows))
    return "\n".join(line.rstrip() for line in lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def difference_line(reward: str, interval: Interval) -> str:
    """The paired difference in words."""
    verdict = "above 0" if interval.low > 0 else "not above 0"
    return (
        f"{reward}: Top@1 of entrgi minus bon, paired: {interval.mean:+.3f} "
        f"[{interval.low:+.3f}, {interval.high:+.3f}] (95%), {verdict}"
    )


def comparison_text(comparison: Comparison) -> str:
    """Table and paired differences."""
    lines = [text_table(HEADER, [cells(row) for row in comparison.rows]), ""]
    return "\n".join(lines + [difference_line(*item) for item in comparison.differences.items()])


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """The same figures for machines."""
    rows = [
        {
            "reward_model": row.reward_model,
            "method": row.method,
            **{
                name: [round(value.mean, 4), round(value.half, 4)]
                for name, value in (
                    ("top1", row.top),
                    ("avg", row.average),
                    ("vader", row.judge),
                    ("nll", row.nll),
                    ("words", row.words),
                )
            },
            "empty": row.empty,
        }
        for row in comparison.rows
    ]
    differences = {name: [round(found.mean, 4), round(found.half, 4)] for name, found in comparison.differences.items()}
    return {"rows": rows, "entrgi_minus_bon": differences}


def comparison_markdown(comparison: Comparison, prompts: Sequence[str], plot: str) -> str:
    """A report: table, differences, plot, and the first answers of every method as they came."""
    parts = [
        "# Guidance methods compared",
        "Mean ± half of the 95% interval over prompts. Top@1 is the final reward of the answer that is returned "
        "(for `none` the first of the trajectories), Avg@N the mean over all trajectories. VADER (sentiment, -1 to 1) "
        "and SmolLM2's negative log-likelihood per token (lower is more fluent) judge the returned answer and take "
        "no part in guidance.",
        markdown_table(HEADER, [cells(row) for row in comparison.rows]),
        "\n".join(f"- {difference_line(*item)}" for item in comparison.differences.items()),
        f"![Rewards by method]({plot})",
        "## Answers as they came",
    ]
    for index, prompt in enumerate(prompts[:5]):
        lines = [f"**{prompt}**", ""]
        lines += [f"- {row.reward_model}, {row.method}: {row.texts[index].strip()}" for row in comparison.rows]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def comparison_svg(comparison: Comparison) -> str:
    """Top@1 and Avg@N with their intervals, one line a method."""
    left, width, line_height = 190, 420, 24
    rows = comparison.rows
    values = [value for row in rows for interval in (row.top, row.average) for value in (interval.low, interval.high)]
    low, high = min(values), max(values)
    span = (high - low) or 1.0

    def x(value: float) -> float:
        return left + (value - low) / span * width

    height = line_height * len(rows) + 60
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 30}" height="{height}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
    ]
    for tick in range(int(low) - 1, int(high) + 2):
        if low <= tick <= high:
            parts.append(f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="20" y2="{height - 34}" stroke="#ddd"/>')
            parts.append(f'<text x="{x(tick):.1f}" y="{height - 20}" text-anchor="middle">{tick}</text>')
    for index, row in enumerate(rows):
        y = 32 + index * line_height
        parts.append(f'<text x="{left - 12}" y="{y + 4}" text-anchor="end">{row.reward_model}, {row.method}</text>')
        for offset, (name, found) in ((-4, ("Avg@N", row.average)), (4, ("Top@1", row.top))):
            colour, at = COLOURS[name], y + offset
            parts.append(
                f'<line x1="{x(found.low):.1f}" x2="{x(found.high):.1f}" y1="{at}" y2="{at}" stroke="{colour}"/>'
            )
            parts.append(f'<circle cx="{x(found.mean):.1f}" cy="{at}" r="3.5" fill="{colour}"/>')
    for index, (name, colour) in enumerate(COLOURS.items()):
        parts.append(f'<text x="{left + 90 * index}" y="{height - 4}" fill="{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def splits_of(report: FluencyReport) -> list[str]:
    """The splits that the answers come from, in order of appearance."""
    return list(dict.fromkeys(verdict.prompt.split for verdict in report.verdicts))


def fluency_text(report: FluencyReport, shown: int) -> str:
    """Calibration, shares, and the first answers of every form as they came."""
    calibration = report.calibration
    lines = [
        f"Threshold {calibration.threshold:.3f} nats a token: "
        f"{calibration.clean_pass:.1%} of clean references pass, {calibration.shuffled_pass:.1%} of shuffled ones.",
        "",
    ]
    present = {(verdict.prompt.form, verdict.prompt.split) for verdict in report.verdicts}
    groups = [(form, split) for form in (None, "chat", "raw") for split in (None, *splits_of(report))]
    rows = []
    for form, split in groups:
        if any(form in (None, known) and split in (None, other) for known, other in present):
            share, low, high, count = report.share(split, form)
            rows.append((form or "all", split or "all", str(count), f"{share:.1%}", f"[{low:.1%}, {high:.1%}]"))
    lines += [text_table(("form", "split", "answers", "fluent and on subject", "95%"), rows), ""]
    # Every tenth answer, so that all splits and both forms are seen; none is chosen.
    stride = max(1, len(report.verdicts) // shown)
    for verdict in report.verdicts[::stride][:shown]:
        mark = "ok" if not verdict.faults else "; ".join(verdict.faults)
        lines.append(f"[{verdict.prompt.form}, {verdict.prompt.split}] {verdict.prompt.text}")
        lines.append(f"    {verdict.text.strip()}  ({mark}; nll {verdict.nll:.2f})")
    return "\n".join(lines)


def fluency_json(report: FluencyReport) -> dict[str, Any]:
    """The same figures for machines."""
    forms = dict.fromkeys(verdict.prompt.form for verdict in report.verdicts)
    return {
        "threshold": round(report.calibration.threshold, 4),
        "clean_pass": report.calibration.clean_pass,
        "shuffled_pass": report.calibration.shuffled_pass,
        "share": [round(value, 4) for value in report.share()],
        "by_split": {split: [round(value, 4) for value in report.share(split)] for split in splits_of(report)},
        "by_form": {form: [round(value, 4) for value in report.share(form=form)] for form in forms},
    }

"""Tables for the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clients.quality.fluency import FluencyReport


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell."""
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in (header, *rows))
    return "\n".join(line.rstrip() for line in lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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

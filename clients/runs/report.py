"""A study as tables, one Markdown file and one HTML file that needs nothing beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from ..terminal import console, printable
from .answers import Answer
from .plots import plots_of
from .study import HEADLINE, Outcome

PAPER = {
    "RewardBench-2": {"bon": 2.99, "entrgi": 3.91},
    "JudgeBench": {"bon": 1.65, "entrgi": 2.44},
    "RM-Bench": {"bon": 5.11, "entrgi": 5.70},
}
"""Top@1 in arXiv 2602.05000 at `PAPER_SETTINGS`."""
PAPER_SETTINGS = (
    "The paper (arXiv 2602.05000): Dream-v0-Instruct-7B, Skywork-Reward-V2-Qwen3-1.7B, K = 4, M = 3, eta 0.5, "
    "temperature 0.7, T = 128 and as many tokens. Rewards of other reward models are on other scales."
)
EXAMPLES = 5
NOTES = (
    "Each figure is the mean over prompts with its 95% bootstrap interval; a prompt's value is the mean over its "
    "seeds. Top@1 is the reward of the answer that a user gets, Avg@N that of all K. The change is that of Top@1 to "
    "the baseline, prompt by prompt; p is that of the paired permutation test after Holm's correction. GFLOPs are two "
    "operations for each parameter and token that a pass reads, and as many again for the way back through the reward "
    "model; passes are taken to read the prompt and the whole canvas, which charges guidance too much where the "
    "server caches prompts. Seconds are those of one request with as many of its like beside it as were in flight; so "
    "they compare, and divided by the concurrency they are what a request costs a busy server."
)
STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid #8886 }
td.text { min-width: 14rem; white-space: pre-wrap }
.wide { overflow-x: auto }
figure { margin: 1rem 0; padding: .5rem; overflow-x: auto; background: #fff }
figure svg { max-width: 100%; height: auto }
"""

Rows = list[list[str]]


def measures_table(outcome: Outcome) -> Rows:
    """The measures of each setting, with the change to the baseline; the first row is the head."""
    columns = list(dict.fromkeys(name for found in outcome.measures.values() for name in found))
    rows = [["setting", *columns[:2], "change", "p", *columns[2:]]]
    for setting, found in outcome.measures.items():
        cells = [str(found[name]) if name in found else "" for name in columns]
        difference = outcome.differences.get(setting)
        told = ["baseline", ""] if setting == outcome.baseline else ["", ""]
        if difference is not None:
            change = difference.change
            told = [f"{change.mean:+.2f} [{change.low:+.2f}, {change.high:+.2f}]", f"{difference.p:.4f}"]
        rows.append([setting, *cells[:2], *told, *cells[2:]])
    return rows


def paper_table(outcomes: Sequence[Outcome]) -> Rows:
    """The paper's Top@1 beside ours at K = 4, where both have it."""
    rows = [["benchmark", "method", "paper", "here"]]
    for outcome in outcomes:
        for method, value in PAPER.get(outcome.name, {}).items():
            same = (each for each in outcome.settings if each.method == method and each.best_of == 4)
            rows += [
                [outcome.name, method, f"{value:.2f}", str(outcome.measures[each.name][HEADLINE])]
                for each in same
                if each.name in outcome.measures
            ]
    return rows


def parts_table(outcome: Outcome) -> Rows:
    """Top@1 of each setting in each part of the benchmark; the head alone where it has no parts."""
    found: dict[str, dict[str, list[float]]] = {}
    for answer in outcome.answers:
        by_setting = found.setdefault(answer.asked.prompt.subset, {})
        by_setting.setdefault(answer.asked.setting.name, []).append(answer.rewards[0])
    rows = [["part", "answers to each", *outcome.measures]]
    for part, rewards in found.items() if len(found) > 1 else ():
        means = (f"{fmean(rewards[name]):.2f}" if name in rewards else "" for name in outcome.measures)
        rows.append([part, str(max(map(len, rewards.values()))), *means])
    return rows


def examples_table(outcome: Outcome) -> Rows:
    """The answers to the first prompts under each setting as they came, with their rewards."""
    by_prompt: dict[str, dict[str, Answer]] = {}
    for answer in outcome.answers:
        by_prompt.setdefault(answer.asked.prompt.id, {}).setdefault(answer.asked.setting.name, answer)
    names = [*outcome.measures]
    rows = [["prompt", *names]]
    for answers in list(by_prompt.values())[:EXAMPLES]:
        told = {name: f"[{answer.rewards[0]:.2f}] {answer.texts[0].strip()}" for name, answer in answers.items()}
        rows.append([next(iter(answers.values())).asked.prompt.text, *(told.get(name, "") for name in names)])
    return rows


def unanswered(outcome: Outcome) -> str:
    """Which settings lack answers, and how many; nothing where none does."""
    told = ", ".join(f"{setting} {count}" for setting, count in outcome.unanswered.items())
    return told and f"Requests without an answer or without its rewards, of which the journal tells more: {told}."


def show(outcomes: Sequence[Outcome]) -> None:
    """The tables on standard output, then one line of JSON."""
    out = console()
    for outcome in outcomes:
        head, *rows = measures_table(outcome)
        table = Table(*head, title=printable(outcome.title), title_justify="left")
        for row in rows:
            table.add_row(*map(printable, row))
        out.print(table)
        if missing := unanswered(outcome):
            out.print(printable(missing))
    print(json.dumps(document(outcomes)))


def document(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """The figures for machines."""
    return [
        {
            "prompts": outcome.name,
            "reward_model": outcome.reward_model,
            "baseline": outcome.baseline,
            "unanswered": outcome.unanswered,
            "settings": {
                setting: {
                    "measures": {name: asdict(found) for name, found in measures.items()},
                    "difference": asdict(outcome.differences[setting]) if setting in outcome.differences else None,
                    "reward_over_steps": list(outcome.curves.get(setting, ())),
                }
                for setting, measures in outcome.measures.items()
            },
        }
        for outcome in outcomes
    ]


def write(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """report.md with its plots, report.html with them inside, and report.json."""
    folder.mkdir(parents=True, exist_ok=True)
    markdown, html = ["# Guidance compared"], ["<h1>Guidance compared</h1>"]

    def say(text: str) -> None:
        markdown.append(text)
        html.append(f"<p>{escape(text)}</p>")

    def add(title: str, rows: Rows, *, texts: bool = False) -> None:
        markdown.extend([f"## {title}", _markdown(rows)])
        html.extend([f"<h2>{escape(title)}</h2>", _html(rows, "text" if texts else "")])

    if len(beside := paper_table(outcomes)) > 1:
        add("The paper's table beside this run (Top@1, K = 4)", beside)
        say(PAPER_SETTINGS)
    for number, outcome in enumerate(outcomes):
        add(outcome.title, measures_table(outcome))
        if missing := unanswered(outcome):
            say(missing)
        for name, svg in plots_of(outcome).items():
            file = f"{name}-{number}.svg"
            (folder / file).write_text(svg, encoding="utf-8")
            markdown.append(f"![{name}]({file})")
            html.append(f"<figure>{svg[svg.index('<svg') :]}</figure>")
        if len(parts := parts_table(outcome)) > 1:
            add(f"{outcome.title}: Top@1 by part", parts)
        add(f"{outcome.title}: answers side by side", examples_table(outcome), texts=True)
    say(NOTES)
    page = "\n".join(html)
    (folder / "report.html").write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Guidance compared</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>{page}</body></html>\n',
        encoding="utf-8",
    )
    (folder / "report.md").write_text("\n\n".join(markdown) + "\n", encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(document(outcomes)) + "\n", encoding="utf-8")


def _markdown(rows: Rows) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    """Text as it came, that neither ends the cell nor is read as Markdown's or HTML's own."""
    return " ".join(escape(text, quote=False).split()).replace("|", "\\|")


def _html(rows: Rows, kind: str) -> str:
    head, *body = rows
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = ("".join(f'<td class="{kind}">{escape(cell)}</td>' for cell in line) for line in body)
    return f'<div class="wide"><table><tr>{cells}</tr>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'

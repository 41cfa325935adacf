"""`python -m clients.quality judge|fluency|shortcuts`: prints a table, then one JSON line."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx

from clients.arguments import Parser, add_option, server_url
from clients.calls import DEFAULT_URL
from clients.errors import ClientError
from clients.quality import prompts as prompt_file
from clients.quality import shortcuts, shortcuts_report
from clients.quality.fluency import calibrate, judge, measure
from clients.quality.journal import HEADER, judged, pairs_by_setting
from clients.quality.judges import SmolLM, Vader
from clients.quality.report import fluency_json, fluency_text, text_table
from clients.quality.requests import TIMEOUT_SECONDS, models
from clients.runs.journal import Journal

LIMITS = httpx.Limits(max_connections=64)


def parser() -> Parser:
    """The command line."""
    top = Parser(prog="python -m clients.quality", description=__doc__)
    top.add_argument("what", choices=("judge", "fluency", "shortcuts"))
    add_option(top, "--journal", "judge: the file that `clients compare` kept", "none", type=Path, metavar="FILE")
    add_option(top, "--url", "the server", type=server_url, default=DEFAULT_URL)
    add_option(top, "--api-key", "its API key", "none")
    add_option(top, "--concurrency", "requests in flight", type=int, default=4)
    add_option(top, "--seed", "prompt i is sent with this seed plus i", type=int, default=1000)
    add_option(top, "--count", "only the first prompts, for a quick look", "all", type=int)
    group = top.add_argument_group("shortcuts")
    add_option(group, "--reward-model", "repeatable", "every one that is served", action="append")
    add_option(group, "--trajectories", "K, of each request", type=int, default=4)
    for name in ("--max-tokens", "--steps", "--gradient-steps"):
        add_option(group, name, "of each request", "the server's", type=int)
    for name in ("--eta", "--temperature", "--top-p"):
        add_option(group, name, "of each request", "the server's", type=float)
    add_option(group, "--report", "folder for a report: Markdown, plot and JSON", "none", type=Path)
    add_option(top.add_argument_group("fluency"), "--shown", "answers to print", type=int, default=20)
    return top


def run_judge(path: Path) -> None:
    """Judge a journal's answers."""
    with Journal(path) as journal:
        found = pairs_by_setting(journal.records())
    vader, smol = Vader(), SmolLM()
    rows = [judged(setting, pairs, vader, smol) for setting, pairs in found.items()]
    print(text_table(HEADER, [row.cells() for row in rows]))
    print(json.dumps([row.document() for row in rows]))


async def served(client: httpx.AsyncClient) -> tuple[dict[str, Any], list[str]]:
    """The diffusion model's entry of /v1/models, and the reward models' names."""
    entries = await models(client)
    diffusion = next(entry for entry in entries if entry["type"] == "diffusion")
    return diffusion, [entry["id"] for entry in entries if entry["type"] == "reward"]


def settings_of(options: argparse.Namespace) -> shortcuts.Settings:
    """What is asked of the server, from the command line."""
    return shortcuts.Settings(**{each.name: getattr(options, each.name) for each in fields(shortcuts.Settings)})


async def run_shortcuts(options: argparse.Namespace, client: httpx.AsyncClient) -> None:
    """Measure what is not exact, under every reward model. The judge comes last, when the server is idle."""
    found = prompt_file.load()
    prompts = found.compare[: options.count]
    diffusion, rewards = await served(client)
    settings = settings_of(options)
    chosen = shortcuts.options(settings.steps or settings.max_tokens or diffusion["defaults"]["steps"])
    asked = {
        name: await shortcuts.ask_all(client, prompts, chosen, name, settings)
        for name in options.reward_model or rewards
    }
    smol = SmolLM()
    limit = calibrate(smol, found.references).threshold
    documents = []
    for name, runs in asked.items():
        rows = shortcuts.rows_of(runs, [judge(run.answers, smol, limit, found.subjects) for run in runs])
        print(shortcuts_report.shortcuts_text(name, rows), end="\n\n")
        if options.report is not None:
            shortcuts_report.write(options.report, name, rows)
        documents.append(shortcuts_report.shortcuts_json(name, rows))
    print(json.dumps({"prompts": len(prompts), "trajectories": settings.trajectories, "reward_models": documents}))


async def run_fluency(options: argparse.Namespace, client: httpx.AsyncClient) -> None:
    """Judge unguided answers."""
    found = prompt_file.load()
    if options.count is not None:
        found = prompt_file.PromptSet(found.subjects, found.compare, found.fluency[: options.count], found.references)
    report = await measure(client, found, seed=options.seed, concurrency=options.concurrency)
    print(fluency_text(report, options.shown))
    print(json.dumps(fluency_json(report)))


async def run(options: argparse.Namespace) -> None:
    """Open the client and run."""
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    async with httpx.AsyncClient(
        base_url=options.url, headers=headers, timeout=TIMEOUT_SECONDS, limits=LIMITS
    ) as client:
        await {"fluency": run_fluency, "shortcuts": run_shortcuts}[options.what](options, client)


def main() -> int:
    """Entry point; 0, or 1 after an error that is printed."""
    try:
        options = parser().parse_args()
        if options.what != "judge":
            asyncio.run(run(options))
        elif options.journal is None:
            raise ClientError("judge needs --journal, the file that `clients compare` kept")
        else:
            run_judge(options.journal)
    except (ClientError, httpx.HTTPError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

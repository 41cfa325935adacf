"""`python -m clients.quality [compare|fluency|shortcuts]`: prints a table, then one JSON line."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx

from clients.arguments import Parser, add_option
from clients.calls import DEFAULT_URL
from clients.errors import ClientError
from clients.quality import prompts as prompt_file
from clients.quality import shortcuts, shortcuts_report
from clients.quality.compare import Comparison, Settings, compare
from clients.quality.fluency import calibrate, judge, measure
from clients.quality.judges import SmolLM
from clients.quality.report import (
    comparison_json,
    comparison_markdown,
    comparison_svg,
    comparison_text,
    fluency_json,
    fluency_text,
)
from clients.quality.requests import TIMEOUT_SECONDS, models

LIMITS = httpx.Limits(max_connections=64)


def parser() -> Parser:
    """The command line."""
    top = Parser(prog="python -m clients.quality", description=__doc__)
    what = ("compare", "fluency", "shortcuts")
    top.add_argument("what", nargs="?", choices=what, default="compare", help="default: %(default)s")
    add_option(top, "--url", "the server", default=DEFAULT_URL)
    add_option(top, "--api-key", "its API key", "none")
    wanted = "to compare methods: text with one prompt on each line, or JSON lines with `prompt` or `messages`"
    add_option(top, "--prompts", wanted, "the bundled prompts", type=Path, default=prompt_file.PATH, metavar="FILE")
    add_option(top, "--concurrency", "requests in flight", type=int, default=4)
    add_option(top, "--seed", "prompt i is sent with this seed plus i", type=int, default=1000)
    add_option(top, "--count", "only the first prompts, for a quick look", "all", type=int)
    group = top.add_argument_group("compare and shortcuts")
    add_option(group, "--reward-model", "repeatable", "every one that is served", action="append")
    add_option(group, "--method", "compare; repeatable", "every one that is served", action="append")
    add_option(group, "--trajectories", "K, of each request", type=int, default=4)
    for name in ("--max-tokens", "--steps", "--gradient-steps"):
        add_option(group, name, "of each request", "the server's", type=int)
    for name in ("--eta", "--temperature", "--top-p"):
        add_option(group, name, "of each request", "the server's", type=float)
    add_option(group, "--report", "folder for a report: Markdown, plot and JSON", "none", type=Path)
    add_option(top.add_argument_group("fluency"), "--shown", "answers to print", type=int, default=20)
    return top


async def run_compare(options: argparse.Namespace, client: httpx.AsyncClient) -> None:
    """Compare the methods under every reward model."""
    prompts = prompt_file.load(options.prompts).compare[: options.count]
    diffusion, rewards = await served(client)
    methods = options.method or diffusion["guidance_methods"]
    comparison = await compare(client, prompts, options.reward_model or rewards, methods, settings_of(options))
    print(comparison_text(comparison))
    if options.report is not None:
        write_report(options.report, comparison, [prompt.text for prompt in prompts])
    print(json.dumps(comparison_json(comparison)))


async def served(client: httpx.AsyncClient) -> tuple[dict[str, Any], list[str]]:
    """The diffusion model's entry of /v1/models, and the reward models' names."""
    entries = await models(client)
    diffusion = next(entry for entry in entries if entry["type"] != "reward")
    return diffusion, [entry["id"] for entry in entries if entry["type"] == "reward"]


def settings_of(options: argparse.Namespace) -> Settings:
    """What is asked of the server, from the command line."""
    return Settings(**{each.name: getattr(options, each.name) for each in fields(Settings)})


async def run_shortcuts(options: argparse.Namespace, client: httpx.AsyncClient) -> None:
    """Measure what is not exact, under every reward model. The judge comes last, when the server is idle."""
    found = prompt_file.load(options.prompts)
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


def write_report(folder: Path, comparison: Comparison, prompts: list[str]) -> None:
    """report.md, report.svg and report.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(comparison_markdown(comparison, prompts, "report.svg"), encoding="utf-8")
    (folder / "report.svg").write_text(comparison_svg(comparison), encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(comparison_json(comparison)) + "\n", encoding="utf-8")


async def run_fluency(options: argparse.Namespace, client: httpx.AsyncClient) -> None:
    """Judge unguided answers."""
    found = prompt_file.load(options.prompts)
    if options.count is not None:
        found = prompt_file.PromptSet(found.subjects, found.compare, found.fluency[: options.count], found.references)
    report = await measure(client, found, seed=options.seed, concurrency=options.concurrency)
    print(fluency_text(report, options.shown))
    print(json.dumps(fluency_json(report)))


async def run(options: argparse.Namespace) -> None:
    """Open the client and run."""
    if options.what != "compare" and options.prompts.suffix != ".json":
        raise ClientError(f"{options.what} judges texts by their subjects, which only the bundled prompts have")
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    async with httpx.AsyncClient(
        base_url=options.url, headers=headers, timeout=TIMEOUT_SECONDS, limits=LIMITS
    ) as client:
        await {"compare": run_compare, "fluency": run_fluency, "shortcuts": run_shortcuts}[options.what](
            options, client
        )


def main() -> int:
    """Entry point; 0, or 1 after an error that is printed."""
    try:
        asyncio.run(run(parser().parse_args()))
    except (ClientError, httpx.HTTPError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

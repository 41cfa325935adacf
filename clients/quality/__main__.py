"""`python -m clients.quality [compare|fluency|shortcuts]`: prints a table, then one JSON line."""

from __future__ import annotations

import argparse
import asyncio
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx

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


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m clients.quality", description=__doc__)
    top.add_argument("what", nargs="?", choices=("compare", "fluency", "shortcuts"), default="compare")
    top.add_argument("--url", default="http://127.0.0.1:8000")
    top.add_argument("--api-key", help="sent as a bearer token")
    top.add_argument("--prompts", type=Path, default=prompt_file.PATH, help="default: the bundled prompts")
    top.add_argument("--concurrency", type=int, default=4, help="requests in flight")
    top.add_argument("--seed", type=int, default=1000, help="prompt i is sent with seed + i")
    top.add_argument("--count", type=int, help="only the first prompts, for a quick look")
    group = top.add_argument_group("compare and shortcuts")
    group.add_argument("--reward-model", action="append", help="repeatable; default: every one that is served")
    group.add_argument("--method", action="append", help="compare; repeatable; default: every one that is served")
    group.add_argument("--trajectories", type=int, default=4, help="K")
    for name, kind in (("--max-tokens", int), ("--steps", int), ("--gradient-steps", int), ("--eta", float)):
        group.add_argument(name, type=kind, help="default: the server's")
    group.add_argument("--temperature", type=float, help="default: the server's")
    group.add_argument("--top-p", type=float, help="default: the server's")
    group.add_argument("--report", type=Path, help="folder for a report: Markdown, plot and JSON")
    top.add_argument_group("fluency").add_argument("--shown", type=int, default=20, help="answers to print")
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
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    async with httpx.AsyncClient(
        base_url=options.url, headers=headers, timeout=TIMEOUT_SECONDS, limits=LIMITS
    ) as client:
        await {"compare": run_compare, "fluency": run_fluency, "shortcuts": run_shortcuts}[options.what](
            options, client
        )


def main() -> None:
    """Entry point."""
    asyncio.run(run(parser().parse_args()))


if __name__ == "__main__":
    main()

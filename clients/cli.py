"""The command line: `entrgi`, or `python -m clients` in the repository.

Texts go to standard output, everything about them to standard error, so that a pipe gets the text alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, astuple, fields
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from . import loadgen
from .arguments import RESAMPLED, Parser, add_option, server_url, texts_of
from .calls import DEFAULT_URL
from .canvas import CanvasView
from .client import Client, EventStream
from .errors import ClientError
from .events import CanvasFrame, ChoiceFinished, Summary, TextDelta
from .options import Diffusion, Guidance, Options, Resample, WeightedReward, guidance_of
from .runs import batch, compare, samples
from .terminal import console, printable
from .types import GuidanceReport, StepTrace


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0, or 1 after an error that is printed."""
    try:
        options = parser().parse_args(arguments)
        return int(options.run(options))
    except ClientError as error:
        console(stderr=True).print(f"error: {printable(str(error))}", style="red")
        return 1
    except ModuleNotFoundError as error:  # what `compare`, `eval` and parquet need, and nobody else
        told = f"error: {error.name} is not installed: pip install 'entrgi-client[eval]'"
        console(stderr=True).print(told, style="red")
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, say `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def parser() -> Parser:
    """All commands with their flags."""
    made = Parser(
        prog="python -m clients" if __package__ == "clients" else "entrgi",
        description="Talk to an entrgi server. COMMAND --help lists a command's flags. Where a text is wanted, - reads "
        "it from standard input.",
    )
    connection = Parser(add_help=False)
    add_option(connection, "--url", "the server", type=server_url, default=DEFAULT_URL)
    add_option(connection, "--api-key", "its API key", "the variable ENTRGI_API_KEY, if there is one")
    commands = made.add_subparsers(required=True, metavar="COMMAND")

    complete = commands.add_parser("complete", parents=[connection], help="complete a prompt")
    complete.add_argument("prompt", help="the text to go on from, or -")
    _generation_arguments(complete)
    complete.add_argument("--chat", action="store_true", help="put the prompt into the chat template, as a user turn")
    add_option(complete, "--suffix", "text behind the gap to fill", "none")
    complete.add_argument("--stream", action="store_true", help="print the text as it comes")
    complete.add_argument("--canvas", action="store_true", help="watch every trajectory's canvas (implies --stream)")
    complete.add_argument("--trace", action="store_true", help="tell what every step of every trajectory did")
    complete.add_argument("--json", action="store_true", help="print the whole answer as JSON")
    complete.set_defaults(run=_complete)

    models = commands.add_parser("models", parents=[connection], help="list what is served")
    models.add_argument("--json", action="store_true", help="print the entries as JSON, with all defaults and limits")
    models.set_defaults(run=_models)

    score = commands.add_parser("score", parents=[connection], help="the rewards of responses to a prompt")
    score.add_argument("prompt", help="what they respond to, or -")
    score.add_argument("responses", nargs="+", metavar="response", help="a response, or -")
    score.set_defaults(run=_score)

    rerank = commands.add_parser("rerank", parents=[connection], help="the same responses, best first")
    rerank.add_argument("prompt", help="what they respond to, or -")
    rerank.add_argument("responses", nargs="+", metavar="response", help="a response, or -")
    add_option(rerank, "--top-n", "how many to print", "all", type=int)
    rerank.set_defaults(run=_rerank)
    for command in (score, rerank):
        add_option(command, "--model", "the reward model", "the first served")
        command.add_argument("--json", action="store_true", help="print the whole answer as JSON")

    for name, (add, text) in _RUNS.items():
        add(commands.add_parser(name, help=text))

    load = commands.add_parser("loadgen", parents=[connection], help="put load on the server and print percentiles")
    loadgen.add_arguments(load)
    load.set_defaults(run=loadgen.run)
    return made


_RUNS = {
    "compare": (compare.add_compare, "compare methods and settings on prompts of yours"),
    "eval": (compare.add_eval, "compare them on RewardBench-2, RM-Bench and JudgeBench"),
    "sample": (samples.add_arguments, "write guided completions as training data"),
    "batch": (batch.add_arguments, "answer a file in OpenAI's batch format"),
}
"""Commands that ask many things, and go on from their journal."""

_GENERATION: dict[str, tuple[type, str]] = {
    "max-tokens": (int, "tokens of the answer at most: the size of the canvas"),
    "steps": (int, "denoising steps"),
    "best-of": (int, "trajectories that compete"),
    "n": (int, "answers that come back"),
    "seed": (int, "the same seed gives the same answer"),
    "temperature": (float, "0 takes the most probable token"),
    "top-p": (float, "keep the most probable tokens up to this mass"),
    "top-k": (int, "keep this many tokens"),
    "algorithm": (str, "which positions are revealed first"),
    "block-length": (int, "fill the canvas in blocks of this many tokens, from the left"),
    "entropy-bound": (float, "nats that may be revealed in one step, with --algorithm entropy_bound"),
    "confidence-threshold": (float, "probability above which a position is revealed, with --algorithm threshold"),
    "cfg-scale": (float, "classifier-free guidance against a masked prompt"),
    "timeout": (float, "deadline of the whole request in seconds"),
    "gradient-steps": (int, "Adam steps along the reward's gradient in each guided step"),
    "eta": (float, "Adam's step size"),
    "guidance-start": (float, "share of the run before the first guided step"),
    "guidance-stop": (float, "share of the run after which no step is guided"),
    "guidance-every": (int, "guide one of so many steps"),
    **{name: (kind, text) for name, (kind, _, text) in RESAMPLED.items()},
}
"""Flags of which the server has the defaults, by their name: type and help."""


def _generation_arguments(command: argparse.ArgumentParser) -> None:
    add_option(command, "--model", "the diffusion model", "the served one")
    text = (
        "how rewards steer the answer: one of guidance_methods in `models --json`, with +smc if its trajectories are "
        "resampled (smc alone is bon+smc)"
    )
    add_option(command, "--guidance", text, "none", metavar="METHOD[+smc]")
    add_option(
        command,
        "--reward-model",
        "repeatable; several are summed by their weights",
        "the first served",
        action="append",
        metavar="NAME[=WEIGHT]",
    )
    for name, (kind, text) in _GENERATION.items():
        add_option(command, f"--{name}", text, "the server's", type=kind)
    add_option(command, "--stop", "a string that ends the text; repeatable", "none", action="append")


def generation_options(given: argparse.Namespace) -> Options:
    """The request fields of the parsed arguments; those not given are left to the server."""
    options: Options = {}
    for name in ("model", "max_tokens", "temperature", "top_p", "top_k", "seed", "n", "best_of", "stop", "timeout"):
        value = getattr(given, name)
        if value is not None:
            options[name] = value
    diffusion = Diffusion(
        steps=given.steps,
        algorithm=given.algorithm,
        entropy_bound=given.entropy_bound,
        confidence_threshold=given.confidence_threshold,
        block_length=given.block_length,
        cfg_scale=given.cfg_scale,
    )
    if diffusion != Diffusion():
        options["diffusion"] = diffusion
    guidance = _guidance(given)
    if guidance is not None:
        options["guidance"] = guidance
    if given.trace:
        options["trace"] = True
    return options


def _guidance(given: argparse.Namespace) -> Guidance | None:
    if given.guidance is None:
        window = (f"guidance-{end}" for end in ("start", "stop", "every"))
        for name in ("reward-model", "gradient-steps", "eta", *window, *RESAMPLED):
            if getattr(given, name.replace("-", "_")) is not None:
                raise ClientError(f"--{name} needs --guidance")
        return None
    rewards = [_weighted(text) for text in given.reward_model or []]
    single = len(rewards) == 1 and rewards[0].weight == 1.0
    resample = Resample(**{each.name: getattr(given, f"resample_{each.name}") for each in fields(Resample)})
    return guidance_of(
        given.guidance,
        None if resample == Resample() else resample,
        reward_model=rewards[0].model if single else None,
        reward_models=None if single or not rewards else tuple(rewards),
        gradient_steps=given.gradient_steps,
        eta=given.eta,
        start=given.guidance_start,
        stop=given.guidance_stop,
        every=given.guidance_every,
    )


def _weighted(text: str) -> WeightedReward:
    name, found, weight = text.rpartition("=")
    try:
        return WeightedReward(name, float(weight)) if found else WeightedReward(text)
    except ValueError:
        raise ClientError(f"--reward-model {text!r}: the weight is not a number") from None


def _client(given: argparse.Namespace) -> Client:
    return Client(given.url, api_key=given.api_key)


def _complete(given: argparse.Namespace) -> int:
    options = generation_options(given)
    if given.json and (given.stream or given.canvas):
        raise ClientError("--json prints the whole answer, --stream and --canvas its parts: give one of them")
    (prompt,) = texts_of([given.prompt])
    chat_template = True if given.chat else None
    with _client(given) as client:
        if given.stream or given.canvas:
            stream = client.stream_complete(
                prompt, suffix=given.suffix, chat_template=chat_template, canvas=given.canvas, **options
            )
            with stream:
                _show_stream(stream, canvas=given.canvas)
            return 0
        completion = client.complete(prompt, suffix=given.suffix, chat_template=chat_template, **options)
    if given.json:
        return _print_json(asdict(completion))
    for choice in completion.choices:
        console().print(printable(choice.text))
        _show_ending(choice.finish_reason, choice.reward)
    _show_report(completion.guidance, completion.trace)
    return 0


def _print_json(document: Any) -> int:
    print(json.dumps(document, indent=2))
    return 0


def _show_stream(stream: EventStream, *, canvas: bool) -> None:
    view, out, screen = CanvasView(), console(), Console(stderr=True)
    texts: dict[int, str] = {}
    live = Live(view, console=screen, refresh_per_second=12, transient=True) if canvas and screen.is_terminal else None
    if live:
        live.start()
    try:
        for event in stream:
            match event:
                case CanvasFrame():
                    view.update(event)
                case TextDelta() if canvas or event.index > 0:
                    texts[event.index] = texts.get(event.index, "") + event.text
                case TextDelta():
                    out.print(printable(event.text), end="")
                case ChoiceFinished():
                    if live:
                        live.stop()
                    out.print(printable(texts.get(event.index, "")))
                    _show_ending(event.finish_reason, event.reward)
                case Summary():
                    _show_report(event.guidance, event.trace)
    finally:
        if live:
            live.stop()


def _show_ending(finish_reason: str | None, reward: float | None) -> None:
    told = f"[{finish_reason}]" if reward is None else f"[{finish_reason}, reward {reward:.3f}]"
    console(stderr=True).print(told, style="dim")


def _show_report(report: GuidanceReport | None, trace: list[list[list[StepTrace]]] | None) -> None:
    if report is None:
        return
    rewards = [f"{r:.2f}" for prompt in report.rewards or [] for r in prompt if r is not None]
    told = f"; rewards of all trajectories {', '.join(rewards)}" if rewards else ""
    if report.approximations:
        told += f"; not exact: {printable(', '.join(report.approximations))}"
    screen = console(stderr=True)
    screen.print(
        f"{report.method}, seed {report.seed}, {report.steps} steps in {report.generation_ms / 1000:.2f} s{told}",
        style="dim",
    )
    for prompt in trace or []:
        for index, steps in enumerate(prompt):
            columns = [each.name for each in fields(StepTrace)]
            table = Table(*columns, title=f"trajectory {index}", title_justify="left")
            for step in steps:
                table.add_row(*map(_cell, astuple(step)))
            screen.print(table)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def _models(given: argparse.Namespace) -> int:
    with _client(given) as client:
        served = client.models()
    if given.json:
        return _print_json([model.details for model in served])
    table = Table("model", "kind", "family", "context")
    for model in served:
        context = model.details.get("max_model_len", "")
        table.add_row(printable(model.id), model.kind, printable(str(model.details.get("family", ""))), str(context))
    console().print(table)
    return 0


def _score(given: argparse.Namespace) -> int:
    prompt, *responses = texts_of([given.prompt, *given.responses])
    with _client(given) as client:
        scores = client.score(prompt, responses, model=given.model)
    if given.json:
        return _print_json(asdict(scores))
    return _show_rewards([(entry.score, responses[entry.index]) for entry in scores.data])


def _rerank(given: argparse.Namespace) -> int:
    prompt, *responses = texts_of([given.prompt, *given.responses])
    with _client(given) as client:
        ranked = client.rerank(prompt, responses, model=given.model, top_n=given.top_n)
    if given.json:
        return _print_json(asdict(ranked))
    return _show_rewards([(result.relevance_score, responses[result.index]) for result in ranked.results])


def _show_rewards(rewards: Sequence[tuple[float, str]]) -> int:
    out = console()
    for reward, text in rewards:
        out.print(f"{reward:9.4f}  {printable(text)}")
    return 0

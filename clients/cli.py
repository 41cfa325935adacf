"""The command line: `python -m clients complete|models|score`, and `loadgen` for load.

Texts go to standard output, everything about them to standard error, so that a pipe gets the text alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.live import Live
from rich.table import Table

from clients import loadgen
from clients.calls import DEFAULT_URL
from clients.canvas import CanvasView, printable
from clients.client import Client, EventStream
from clients.errors import ClientError
from clients.events import CanvasFrame, ChoiceFinished, Summary, TextDelta
from clients.options import Diffusion, Guidance, Options, WeightedReward
from clients.types import GuidanceReport

_OUT = Console(highlight=False, markup=False, soft_wrap=True)
_ERR = Console(stderr=True, highlight=False, markup=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0, or 1 after an error that is printed."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except ClientError as error:
        _ERR.print(f"error: {printable(str(error))}", style="red")
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, say `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m clients", description="Talk to an entrgi server.")
    connection = argparse.ArgumentParser(add_help=False)
    connection.add_argument("--url", default=DEFAULT_URL, help="default: %(default)s")
    connection.add_argument("--api-key", help="default: ENTRGI_API_KEY")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    complete = commands.add_parser("complete", parents=[connection], help="complete a prompt")
    complete.add_argument("prompt")
    _generation_arguments(complete)
    complete.add_argument("--chat", action="store_true", help="put the prompt into the chat template, as a user turn")
    complete.add_argument("--suffix", help="text behind the gap to fill")
    complete.add_argument("--stream", action="store_true", help="print the text as it comes")
    complete.add_argument("--canvas", action="store_true", help="watch every trajectory's canvas (implies --stream)")
    complete.add_argument("--json", action="store_true", help="print the whole answer as JSON")
    complete.set_defaults(run=_complete)

    models = commands.add_parser("models", parents=[connection], help="list what is served")
    models.add_argument("--json", action="store_true", help="print the entries as JSON")
    models.set_defaults(run=_models)

    score = commands.add_parser("score", parents=[connection], help="the reward of responses to a prompt")
    score.add_argument("prompt")
    score.add_argument("responses", nargs="+", metavar="response")
    score.add_argument("--model", help="reward model; default: the first served")
    score.set_defaults(run=_score)

    load = commands.add_parser("loadgen", parents=[connection], help="open-loop load with percentiles")
    loadgen.add_arguments(load)
    load.set_defaults(run=loadgen.run)
    return parser


def _generation_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="default: the served diffusion model")
    parser.add_argument(
        "--guidance",
        metavar="METHOD",
        help="how rewards steer the generation: none, or one of guidance_methods in `models --json`",
    )
    parser.add_argument(
        "--reward-model",
        action="append",
        metavar="NAME[=WEIGHT]",
        help="repeatable; several are summed by their weights",
    )
    parser.add_argument("--gradient-steps", type=int, help="Adam steps per denoising step")
    parser.add_argument("--eta", type=float, help="Adam's step size")
    parser.add_argument("--guidance-start", type=float, help="share of the run before the first guided step")
    parser.add_argument("--guidance-stop", type=float, help="share of the run after which no step is guided")
    parser.add_argument("--guidance-every", type=int, help="guide only every so many steps")
    for name in ("max-tokens", "steps", "best-of", "n", "seed", "top-k", "block-length"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("temperature", "top-p", "cfg-scale"):
        parser.add_argument(f"--{name}", type=float)
    parser.add_argument("--algorithm", help="which positions are revealed first")
    parser.add_argument("--entropy-bound", type=float, help="nats a step, with --algorithm entropy_bound")
    parser.add_argument("--confidence-threshold", type=float, help="with --algorithm threshold")
    parser.add_argument("--stop", action="append", help="stop string, repeatable")
    parser.add_argument("--timeout", type=float, help="the server's deadline in seconds")


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
    return options


def _guidance(given: argparse.Namespace) -> Guidance | None:
    if given.guidance is None:
        for name in ("reward_model", "gradient_steps", "eta", "guidance_start", "guidance_stop", "guidance_every"):
            if getattr(given, name) is not None:
                raise ClientError(f"--{name.replace('_', '-')} needs --guidance")
        return None
    rewards = [_weighted(text) for text in given.reward_model or []]
    single = len(rewards) == 1 and rewards[0].weight == 1.0
    return Guidance(
        given.guidance,
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
    chat_template = True if given.chat else None
    with _client(given) as client:
        if given.stream or given.canvas:
            stream = client.stream_complete(
                given.prompt, suffix=given.suffix, chat_template=chat_template, canvas=given.canvas, **options
            )
            with stream:
                _show_stream(stream, canvas=given.canvas)
            return 0
        completion = client.complete(given.prompt, suffix=given.suffix, chat_template=chat_template, **options)
    if given.json:
        print(json.dumps(asdict(completion), indent=2))
        return 0
    for choice in completion.choices:
        _OUT.print(printable(choice.text))
        _show_ending(choice.finish_reason, choice.reward)
    _show_report(completion.guidance)
    return 0


def _show_stream(stream: EventStream, *, canvas: bool) -> None:
    view = CanvasView()
    texts: dict[int, str] = {}
    live = Live(view, console=_ERR, refresh_per_second=12, transient=True) if canvas and _ERR.is_terminal else None
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
                    _OUT.print(printable(event.text), end="")
                case ChoiceFinished():
                    if live:
                        live.stop()
                    _OUT.print(printable(texts.get(event.index, "")))
                    _show_ending(event.finish_reason, event.reward)
                case Summary():
                    _show_report(event.guidance)
    finally:
        if live:
            live.stop()


def _show_ending(finish_reason: str | None, reward: float | None) -> None:
    _ERR.print(f"[{finish_reason}]" if reward is None else f"[{finish_reason}, reward {reward:.3f}]", style="dim")


def _show_report(report: GuidanceReport | None) -> None:
    if report is None:
        return
    rewards = [f"{r:.2f}" for prompt in report.rewards or [] for r in prompt if r is not None]
    told = f"; rewards of all trajectories {', '.join(rewards)}" if rewards else ""
    if report.approximations:
        told += f"; not exact: {printable(', '.join(report.approximations))}"
    _ERR.print(
        f"{report.method}, seed {report.seed}, {report.steps} steps in {report.generation_ms / 1000:.2f} s{told}",
        style="dim",
    )


def _models(given: argparse.Namespace) -> int:
    with _client(given) as client:
        served = client.models()
    if given.json:
        print(json.dumps([model.details for model in served], indent=2))
        return 0
    table = Table("model", "kind", "family", "context")
    for model in served:
        context = model.details.get("max_model_len", "")
        table.add_row(printable(model.id), model.kind, printable(str(model.details.get("family", ""))), str(context))
    _OUT.print(table)
    return 0


def _score(given: argparse.Namespace) -> int:
    with _client(given) as client:
        scores = client.score(given.prompt, given.responses, model=given.model)
    for entry in scores.data:
        _OUT.print(f"{entry.score:9.4f}  {printable(given.responses[entry.index])}")
    return 0

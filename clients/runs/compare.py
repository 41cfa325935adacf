"""`compare` and `eval`: a sweep over one's own prompts, and over the published benchmarks."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from ..arguments import add_option
from ..errors import ClientError
from . import report, study, sweep
from .rows import PAIRS, pairs, write_rows
from .sources import BENCHMARKS, load

METHODS = ("none", "bon@4,8,16,32", "expectation", "aps", "entrgi")
"""The paper's methods at its K, and best of N at the K that its compute may buy."""


def add_compare(parser: argparse.ArgumentParser) -> None:
    """The flags of `compare`."""
    sweep.add_servers(parser)
    wanted = "one prompt on each line, JSON lines with `prompt` or `messages`, or a table; - is standard input"
    parser.add_argument("--prompts", required=True, metavar="FILE", help=wanted)
    _add_shared(parser, ("none", "bon", "entrgi"))
    parser.set_defaults(run=compare)


def add_eval(parser: argparse.ArgumentParser) -> None:
    """The flags of `eval`."""
    sweep.add_servers(parser)
    wanted = (
        f"what to ask, repeatable: {', '.join(BENCHMARKS)}, each with =hub@COMMIT for its data on the hub or =FILE for "
        "a table in its columns; or a file of prompts as `compare` takes it"
    )
    parser.add_argument("data", nargs="+", metavar="DATA", help=wanted)
    _add_shared(parser, METHODS)
    parser.set_defaults(run=evaluate, curves=8)


def _add_shared(parser: argparse.ArgumentParser, methods: tuple[str, ...]) -> None:
    text = (
        "a method of the server's, with +smc if its trajectories are resampled (smc alone is bon+smc), and with K of "
        "its own, as bon@4,8,16; repeatable"
    )
    add_option(parser, "--method", text, " ".join(methods), action="append", metavar="METHOD[+smc][@K,...]")
    parser.set_defaults(methods=methods)
    study.add_arguments(parser)
    sweep.add_arguments(parser)


def compare(given: argparse.Namespace) -> int:
    """Run `compare`."""
    return _run(given, [given.prompts])


def evaluate(given: argparse.Namespace) -> int:
    """Run `eval`."""
    return _run(given, given.data)


def _run(given: argparse.Namespace, sources: list[str]) -> int:
    for one, other in itertools.combinations(sources, 2):
        if _name(one) == _name(other):
            told = f"{one} and {other} would both be called {_name(one)}"
            raise ClientError(f"{told}: give one of the files another name, or ask them in two runs")
    sets = {_name(source): load(source) for source in sources}
    outcomes = study.Study(given, sets, given.method or given.methods).run()
    if given.report is not None:
        report.write(given.report, outcomes)
    report.show(outcomes)
    if given.pairs is not None:
        answers = (answer for outcome in outcomes for answer in outcome.answers)
        rows = (pair for answer in answers for pair in pairs(answer.asked, answer.completion))
        write_rows(given.pairs, rows, PAIRS, raw=given.raw)
    return 0


def _name(source: str) -> str:
    name = source.partition("=")[0]
    return BENCHMARKS[name].name if name in BENCHMARKS else Path(source).name

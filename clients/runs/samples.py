"""`sample`: guided completions as training data."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from ..arguments import add_option
from ..errors import ClientError
from ..terminal import console
from ..types import ChatCompletion, Completion
from . import sweep
from .answers import completion_of
from .engine import answer_all
from .journal import Journal, Record
from .rows import PAIRS, SAMPLES, Row, data_file, pairs, samples, write_rows
from .sources import load
from .sweep import Asked

RGRL = {"gradient_steps": (1,), "eta": (0.5,), "steps": (128,), "temperature": (0.9,), "best_of": (4,)}
"""How the paper samples to train on (RGRL, arXiv 2602.05000)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `sample`."""
    sweep.add_servers(parser)
    wanted = "one prompt on each line, JSON lines with `prompt` or `messages`, or a table; - is standard input"
    parser.add_argument("--prompts", required=True, metavar="FILE", help=wanted)
    text = "the data, .jsonl or .parquet; the journal from which the same command goes on lies beside it"
    parser.add_argument("--out", type=data_file, required=True, metavar="FILE", help=text)
    text = "a file for the best and the worst text of each prompt, as chosen and rejected; .jsonl or .parquet"
    add_option(parser, "--pairs", text, "none", type=data_file, metavar="FILE")
    add_option(parser, "--method", "how rewards steer", default="entrgi")
    text = "texts of each prompt that become rows: the best, and with --method none the first that were drawn"
    add_option(parser, "--keep", text, type=sweep.positive, default=1)
    text = "I/N: only the prompts whose number leaves I when divided by N"
    add_option(parser, "--shard", text, "0/1", type=shard, default=(0, 1), metavar="I/N")
    told = ", ".join(f"--{name.replace('_', '-')} {value:g}" for name, (value,) in RGRL.items())
    parser.add_argument("--rgrl", action="store_true", help=f"the paper's settings for training data: {told}")
    text = "leave out token ids and step maps, for which every canvas must be filled to its end"
    parser.add_argument("--text-only", action="store_true", help=text)
    sweep.add_arguments(parser)
    parser.set_defaults(run=run)


def shard(text: str) -> tuple[int, int]:
    """(I, N) of `I/N`, with 0 <= I < N. Raises ArgumentTypeError where it is something else."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"wanted is I/N with I from 0 to N - 1, as 0/4, not {text!r}")
    return int(index), int(count)


def run(given: argparse.Namespace) -> int:
    """Run the command."""
    if given.rgrl:
        vars(given).update({name: value for name, value in RGRL.items() if getattr(given, name) is None})
    servers = sweep.servers_of(given)
    settings = sweep.settings_of(given, [given.method], sweep.models_of(servers))
    extra = {} if given.text_only else {"return_token_ids": True, "return_step_map": True}
    prompts = enumerate(load(given.prompts)[: given.limit])
    index, count = given.shard
    own = [(number, prompt) for number, prompt in prompts if number % count == index]
    asked = {one.request.custom_id: one for one in sweep.asked(own, settings, given.seeds, raw=given.raw, extra=extra)}
    with Journal(given.out.with_name(f"{given.out.name}.journal.jsonl")) as journal:
        answer_all([one.request for one in asked.values()], journal, servers, "samples")

    def found() -> Iterator[Record]:  # read anew each time: a journal may be larger than memory
        return (record for record in journal.records() if record.custom_id in asked)

    refused = [record.refusal for record in found() if record.refusal is not None]
    if asked and len(refused) == len(asked):
        raise ClientError(f"all {len(refused)} requests were refused, the first with {refused[0]}")

    def rows(of: Callable[[Asked, Completion | ChatCompletion], Iterable[Row]]) -> Iterator[Row]:
        for record in found():
            if record.refusal is None:
                yield from of(asked[record.custom_id], completion_of(record))

    count = write_rows(given.out, rows(partial(samples, keep=given.keep)), SAMPLES, raw=given.raw)
    told = f"{count} rows in {given.out}"
    if given.pairs is not None:
        told += f", {write_rows(given.pairs, rows(pairs), PAIRS, raw=given.raw)} pairs in {given.pairs}"
    if refused:
        told += f"; {len(refused)} requests were refused, the first with {refused[0]}"
    console(stderr=True).print(told)
    return 0

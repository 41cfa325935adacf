"""Rows of training data in TRL's columns, and the files that hold them.

A prompt that was sent as a chat makes a conversational row, a raw text a standard one. What a row has beside `prompt`
and `completion`, or `chosen` and `rejected`, tells where it comes from; trainers leave such columns out.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec

from ..types import ChatCompletion, Completion
from .sweep import Asked

GROUP = 1000
"""Rows that are written to a parquet file at a time."""

ORIGIN = ("prompt_id", "seed", "setting", "settings")
SAMPLES = ("prompt", "completion", "reward", "rewards", "trajectory", "finish_reason", "token_ids", "step_map", *ORIGIN)
PAIRS = ("prompt", "chosen", "rejected", "score_chosen", "score_rejected", *ORIGIN)
"""The columns of `samples` and `pairs`."""

Row = dict[str, Any]


def samples(asked: Asked, completion: Completion | ChatCompletion, keep: int) -> Iterator[Row]:
    """The first `keep` texts of a request as they came, the best or with method `none` those drawn first, each with the
    rewards of all its K trajectories in their own order."""
    report = completion.guidance
    for choice in completion.choices[:keep]:
        yield {
            **_texts(asked, completion=choice.text),
            "reward": choice.reward,
            "rewards": report.rewards[0] if report and report.rewards else [],
            "trajectory": choice.trajectory,
            "finish_reason": choice.finish_reason,
            "token_ids": choice.token_ids,
            "step_map": choice.step_map,
            **_origin(asked),
        }


def pairs(asked: Asked, completion: Completion | ChatCompletion) -> Iterator[Row]:
    """The best and the worst text of a request by reward; nothing where they are the same."""
    ranked = sorted((choice.reward, choice.text) for choice in completion.choices if choice.reward is not None)
    if not ranked:
        return
    (worst, rejected), (best, chosen) = ranked[0], ranked[-1]
    if best > worst and chosen != rejected:
        yield {
            **_texts(asked, chosen=chosen, rejected=rejected),
            "score_chosen": best,
            "score_rejected": worst,
            **_origin(asked),
        }


def _texts(asked: Asked, **texts: str) -> Row:
    body = asked.request.body
    if "messages" not in body:
        return {"prompt": body["prompt"], **texts}
    turns = {name: [{"role": "assistant", "content": text}] for name, text in texts.items()}
    return {"prompt": body["messages"], **turns}


def _origin(asked: Asked) -> Row:
    return {
        "prompt_id": asked.prompt.id,
        "seed": asked.seed,
        "setting": asked.setting.name,
        "settings": msgspec.json.encode(asked.setting.fields).decode(),
    }


def data_file(text: str) -> Path:
    """A path at which `write_rows` can write. Raises ArgumentTypeError, and ModuleNotFoundError where parquet is wanted
    and pyarrow is absent, so that a command ends before it has asked anything."""
    path = Path(text)
    if path.suffix not in (".jsonl", ".parquet"):
        raise argparse.ArgumentTypeError(f"{path}: wanted is a file that ends in .jsonl or .parquet")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: there is no folder {path.parent}")
    if path.suffix == ".parquet":
        import_module("pyarrow.parquet")
    return path


def write_rows(path: Path, rows: Iterable[Row], columns: Sequence[str], *, raw: bool) -> int:
    """Write rows of these columns as the ending of `path` says, .jsonl or .parquet, and put the file in its place when
    it is whole; their number. With `raw` prompts are texts, and else a chat's messages."""
    part = path.with_name(f"{path.name}.part")
    if path.suffix == ".parquet":
        count = _write_parquet(part, iter(rows), columns, raw)
    else:
        with part.open("wb") as file:
            count = sum(file.write(msgspec.json.encode(row) + b"\n") > 0 for row in rows)
    os.replace(part, path)
    return count


def _write_parquet(path: Path, rows: Iterator[Row], columns: Sequence[str], raw: bool) -> int:
    import pyarrow
    from pyarrow import parquet

    turns = pyarrow.list_(pyarrow.struct({"role": pyarrow.string(), "content": pyarrow.string()}))
    texts = dict.fromkeys(("prompt", "completion", "chosen", "rejected"), pyarrow.string() if raw else turns)
    kinds = texts | {
        "reward": pyarrow.float64(),
        "rewards": pyarrow.list_(pyarrow.float64()),
        "score_chosen": pyarrow.float64(),
        "score_rejected": pyarrow.float64(),
        "trajectory": pyarrow.int32(),
        "token_ids": pyarrow.list_(pyarrow.int32()),
        "step_map": pyarrow.list_(pyarrow.int32()),
        "seed": pyarrow.int64(),
    }
    schema = pyarrow.schema({name: kinds.get(name, pyarrow.string()) for name in columns})
    count = 0
    with parquet.ParquetWriter(path, schema) as writer:
        while group := list(itertools.islice(rows, GROUP)):
            writer.write_table(pyarrow.Table.from_pylist(group, schema=schema))
            count += len(group)
    return count

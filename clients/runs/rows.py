"""Rows of training data in TRL's columns, and the files that hold them.

A prompt that was sent as a chat makes a conversational row, a raw text a standard one. What a row has beside `prompt`
and `completion`, or `chosen` and `rejected`, tells where it comes from; trainers leave such columns out.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from ..errors import ClientError
from ..types import ChatCompletion, Completion
from .sweep import Asked

GROUP = 1000
"""Rows that are written to a parquet file at a time."""

Row = dict[str, Any]


def samples(asked: Asked, completion: Completion | ChatCompletion, keep: int) -> Iterator[Row]:
    """The `keep` best texts of a request, each with the rewards of all its K trajectories in their own order."""
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
    ranked = sorted((choice.reward or 0.0, choice.text) for choice in completion.choices)
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


def write_rows(path: Path, rows: Iterable[Row]) -> int:
    """Write rows as the ending of `path` says, .jsonl or .parquet, and put the file in its place when it is whole;
    their number. Raises ClientError for another ending."""
    if path.suffix not in (".jsonl", ".parquet"):
        raise ClientError(f"{path}: wanted is a file that ends in .jsonl or .parquet")
    part = path.with_name(f"{path.name}.part")
    if path.suffix == ".parquet":
        count = _write_parquet(part, iter(rows))
    else:
        with part.open("wb") as file:
            count = sum(file.write(msgspec.json.encode(row) + b"\n") > 0 for row in rows)
    os.replace(part, path)
    return count


def _write_parquet(path: Path, rows: Iterator[Row]) -> int:
    import pyarrow
    from pyarrow import parquet

    turns = pyarrow.list_(pyarrow.struct({"role": pyarrow.string(), "content": pyarrow.string()}))
    kinds = {
        "reward": pyarrow.float64(),
        "rewards": pyarrow.list_(pyarrow.float64()),
        "score_chosen": pyarrow.float64(),
        "score_rejected": pyarrow.float64(),
        "trajectory": pyarrow.int32(),
        "token_ids": pyarrow.list_(pyarrow.int32()),
        "step_map": pyarrow.list_(pyarrow.int32()),
        "seed": pyarrow.int64(),
    }
    first = next(rows, None)
    if first is None:
        raise ClientError(f"{path}: there are no rows to write")
    plain = {name: turns if isinstance(value, list) else pyarrow.string() for name, value in first.items()}
    schema = pyarrow.schema({name: kinds.get(name, kind) for name, kind in plain.items()})
    rows, count = itertools.chain((first,), rows), 0
    with parquet.ParquetWriter(path, schema) as writer:
        while group := list(itertools.islice(rows, GROUP)):
            writer.write_table(pyarrow.Table.from_pylist(group, schema=schema))
            count += len(group)
    return count

"""Prompts to ask: from a file of one's own, or from a benchmark as it is published, on the hub or as a local file.

Published are RewardBench-2, RM-Bench and JudgeBench (the paper's three). Asked is the prompt of a row; what it brings
of chosen and rejected responses is for reward models and is not read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ..arguments import STDIN, prompts_of
from ..errors import ClientError
from ..options import Message, Query

TABLES = (".parquet", ".csv", ".json")


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A published set: its name in tables, its place on the hub, the splits to read, and what its columns are
    called."""

    name: str
    hub: str
    splits: tuple[str, ...]
    prompt: str
    id: str
    subset: str


BENCHMARKS = {
    "rewardbench2": Benchmark("RewardBench-2", "allenai/reward-bench-2", ("test",), "prompt", "id", "subset"),
    "judgebench": Benchmark("JudgeBench", "ScalerLab/JudgeBench", ("gpt", "claude"), "question", "pair_id", "source"),
    "rmbench": Benchmark("RM-Bench", "THU-KEG/RM-Bench", ("train",), "prompt", "id", "domain"),
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is asked: the messages of a chat or a raw text, its id in its source, and the part of it that it belongs
    to."""

    id: str
    query: Query
    subset: str = ""

    @property
    def text(self) -> str:
        """The text, or the last turn."""
        return self.query if isinstance(self.query, str) else self.query[-1]["content"]

    @property
    def messages(self) -> list[Message]:
        """The conversation; a text is one user turn."""
        return [{"role": "user", "content": self.query}] if isinstance(self.query, str) else list(self.query)


def load(source: str) -> list[Prompt]:
    """The prompts of `source`: a file (`-`: standard input) with one on each line or JSON lines with `prompt` or
    `messages`; a parquet, CSV or JSON table with one of these columns; or `BENCHMARK=PLACE`, where PLACE is a file in
    the benchmark's columns or `hub@REVISION`. The same question twice is asked once. Raises ClientError, which names
    the file and what is wanted."""
    name, published, place = source.partition("=")
    if published and name in BENCHMARKS:
        return _of_benchmark(BENCHMARKS[name], place)
    if source != STDIN and not os.path.exists(source):
        forms = f"{', '.join(BENCHMARKS)}, each with =hub@COMMIT or =FILE"
        raise ClientError(f"{source}: there is no such file, and benchmarks are {forms}")
    if Path(source).suffix not in TABLES:
        return _distinct(Prompt(str(number), query) for number, query in enumerate(prompts_of(source)))
    rows = _rows(Path(source))
    return _distinct(Prompt(str(row.get("id", number)), _asked(row, source, number)) for number, row in enumerate(rows))


def _distinct(prompts: Iterable[Prompt]) -> list[Prompt]:
    """The first of those that ask the same: JudgeBench has a question once for each pair of responses to it."""
    found: dict[bytes, Prompt] = {}
    for prompt in prompts:
        found.setdefault(msgspec.json.encode(prompt.query), prompt)
    return [*found.values()]


def _asked(row: Mapping[str, Any], source: str, number: int) -> Query:
    query = row.get("messages") or row.get("prompt")
    if not query or not isinstance(query, str | list):
        raise ClientError(f"{source}, row {number}: a column `prompt` or `messages` is wanted, it has {', '.join(row)}")
    return query


def _of_benchmark(benchmark: Benchmark, place: str) -> list[Prompt]:
    if place.startswith("hub"):
        rows = _from_hub(benchmark, place.removeprefix("hub").removeprefix("@"))
    else:
        rows = _rows(Path(place))
    wanted = {benchmark.prompt, benchmark.id, benchmark.subset}
    for number, row in enumerate(rows):
        if missing := wanted - row.keys():
            lacks = ", ".join(sorted(missing))
            raise ClientError(f"{place}, row {number}: of the columns of {benchmark.name} it lacks {lacks}")
    return _distinct(
        Prompt(str(row[benchmark.id]), _turn(row[benchmark.prompt]), str(row[benchmark.subset])) for row in rows
    )


def _turn(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def _from_hub(benchmark: Benchmark, revision: str) -> list[dict[str, Any]]:
    if not revision:
        raise ClientError(f"{benchmark.hub}: name the revision too, hub@COMMIT, so that a run can be repeated")
    from datasets import load_dataset

    return [
        dict(row) for split in benchmark.splits for row in load_dataset(benchmark.hub, revision=revision, split=split)
    ]


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a table, by its ending."""
    try:
        match path.suffix:
            case ".parquet":
                from pyarrow import parquet

                found: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
            case ".csv":
                from pyarrow import csv

                found = csv.read_csv(path, parse_options=csv.ParseOptions(newlines_in_values=True)).to_pylist()
            case ".json":
                found = msgspec.json.decode(path.read_bytes(), type=list[dict[str, Any]])
            case ".jsonl":
                found = msgspec.json.Decoder(dict[str, Any]).decode_lines(path.read_bytes())
            case _:
                raise ClientError(f"{path}: wanted is a file that ends in .jsonl, {', '.join(TABLES)}")
    except OSError as error:
        raise ClientError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # pyarrow's and msgspec's are among them
        raise ClientError(f"{path} is not what its ending says: {error}") from None
    return found

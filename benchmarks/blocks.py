"""What a token costs in short and in long answers, with block-causal attention and with full attention.

`python -m benchmarks.blocks` runs the same random weights both ways, one request at a time and several at once: as many
steps as tokens, in blocks of 4. A block-causal model reads its prompt once and every finished block once more, so a
token should cost nearly the same wherever it is; with full attention each step reads the whole canvas, and so the first
steps tell what all of them cost. Prints a table and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

from benchmarks.checkpoints import SDAR_40M, Shape, write_sdar
from server.types import DiffusionParams, Job, Message, SamplingParams
from server.wire.config import WorkerConfig
from server.worker import service
from server.worker.runner import Runner

FULL_STEPS = 16
AT_MOST = 1.25
"""Seconds a token of the longest block-causal answer over those of the shortest."""


def load(folder: Path, attention: Literal["full", "block_causal"]) -> Runner:
    """A runner as a worker has it, warmed up, of the checkpoint with this attention."""
    config = WorkerConfig(
        str(folder), device="cpu", dtype="float32", attention=attention, threads=torch.get_num_threads()
    )
    return service.load(config).runner


def seconds_a_token(runner: Runner, length: int, count: int, prompt: int) -> float:
    """Wall seconds of `count` different requests at once, for each token that they revealed."""
    info = runner.loaded.info
    diffusion = DiffusionParams(length, "maskgit_plus", schedule="even", block_length=4, blocks_from=info.blocks_from)
    jobs = [
        Job(
            id=str(index),
            prompt_ids=tuple(range(10 + index, 10 + index + prompt)),
            conversation=(Message("user", "Hi"),),
            sampling=SamplingParams(length, seed=index, ignore_eos=True),
            diffusion=diffusion,
        )
        for index in range(count)
    ]
    for job in jobs:
        runner.add(job, now=0.0)
    before, started, steps = runner.stats.committed_tokens, time.perf_counter(), 0
    while runner.has_work and (info.blocks_from or steps < FULL_STEPS):
        runner.step()
        steps += 1
    seconds = time.perf_counter() - started
    for job in jobs:
        runner.cancel(job.id)
    return seconds / (runner.stats.committed_tokens - before)


def measure(lengths: Sequence[int], counts: Sequence[int], prompt: int, repetitions: int, shape: Shape) -> Any:
    """Rows of the table: milliseconds a token by length, and the longest answer's over the shortest's, each the median
    of the rounds; in a round all lengths run in turn."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_sdar(Path(folder) / "dlm", shape)
        for attention in ("block_causal", "full"):
            runner = load(checkpoint, attention)
            for count in counts:
                rounds = [
                    [seconds_a_token(runner, length, count, prompt) for length in lengths] for _ in range(repetitions)
                ]
                middle = [1e3 * median(column) for column in zip(*rounds, strict=True)]
                over = median(each[-1] / each[0] for each in rounds)
                rows.append({"attention": attention, "at_once": count, "ms": middle, "ratio": over})
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shape", type=int, nargs=6, metavar=("V", "d", "LAYERS", "HEADS", "MLP", "KEY_HEADS"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    shape = Shape(*given.shape) if given.shape else SDAR_40M
    rows = measure(given.lengths, given.at_once, given.prompt, given.repetitions, shape)
    print(
        f"{'attention':14}{'at once':>8}" + "".join(f"{f'L = {length}':>11}" for length in given.lengths) + "   ratio"
    )
    for row in rows:
        times = "".join(f"{each:8.2f} ms" for each in row["ms"])
        print(f"{row['attention']:14}{row['at_once']:8}{times}{row['ratio']:8.2f}")
    worst = max(row["ratio"] for row in rows if row["attention"] == "block_causal")
    report = {"lengths": given.lengths, "prompt": given.prompt, "threads": given.threads, "rows": rows}
    print(json.dumps(report | {"ratio": worst, "at_most": AT_MOST, "ok": worst <= AT_MOST}))


if __name__ == "__main__":
    main()

"""The engine without HTTP, on request: what `benchmarks.online` compares with, which asks what HTTP and scheduling add.

`python -m benchmarks.inprocess --dlm DIR --rm DIR` loads the models, prints `{"ready": true}`, and then answers every
line of its standard input with one line. A question holds the fields of a `Workload` and the number of a request `set`;
the answer holds the requests as a client would send them, the tokens that the engine gave, and what it took. The
requests are submitted at once to a fresh queue in this process. With `"run": false` they are only named.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import warm_up
from benchmarks.workload import Pair, Workload, load, run_engine


def answer(pair: Pair, question: dict[str, Any]) -> dict[str, Any]:
    """The request set that `question` names, run unless it says not to."""
    number, run = question.pop("set"), question.pop("run", True)
    jobs = Workload(**question).jobs(pair, number)
    fields = ("seed", "temperature", "top_p")
    requests = [
        {"prompt": job.conversation[0].content} | {name: getattr(job.sampling, name) for name in fields} for job in jobs
    ]
    if not run:
        return {"requests": requests}
    done = run_engine(pair, jobs)
    if done.stats is None:
        raise ValueError("the engine keeps timers")
    return {
        "requests": requests,
        "token_ids": [[list(ids) for ids in done.token_ids[job.id]] for job in jobs],
        "seconds": done.seconds,
        "cpu_seconds": done.cpu_seconds,
        "engine_steps": done.stats.batch_trajectories.count,
    }


def main() -> None:
    """Answer questions until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dlm", type=Path, required=True)
    parser.add_argument("--rm", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    pair = load(given.dlm, given.rm, torch.float32, torch.device("cpu"))
    warm_up(pair, Workload(best_of=1, prompts=1, max_tokens=8, steps=4))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(pair, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()

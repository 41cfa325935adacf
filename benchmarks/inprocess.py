"""The engine without HTTP, on request: the other half of `benchmarks.online`, which asks what HTTP and scheduling add.

`python -m benchmarks.inprocess --dlm DIR --rm DIR` loads the models, prints `{"ready": true}`, and then answers every
line of its standard input, `{"set": 3, "method": "none", "requests": 16, "max_tokens": 64, "steps": 32}`, with one
line: the requests as a client would send them, the tokens that the engine gave, and what it took. The requests are
submitted at once to a fresh queue in this process, with the threads that the server's worker has. With `"run": false`
they are only named.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import warm_up
from benchmarks.machine import gemm_rate
from benchmarks.workload import Pair, Workload, load, run_engine


def answer(pair: Pair, question: dict[str, Any]) -> dict[str, Any]:
    """The request set that `question` names, run unless it says not to."""
    workload = Workload(
        method=question["method"],
        prompts=question["requests"],
        best_of=1,
        max_tokens=question["max_tokens"],
        steps=question["steps"],
    )
    jobs = workload.jobs(pair, question["set"])
    requests = [
        {
            "prompt": job.conversation[0].content,
            "seed": job.sampling.seed,
            "temperature": job.sampling.temperature,
            "top_p": job.sampling.top_p,
        }
        for job in jobs
    ]
    if not question.get("run", True):
        return {"requests": requests}
    run = run_engine(pair, jobs)
    if run.stats is None:
        raise ValueError("the engine keeps timers")
    return {
        "requests": requests,
        "token_ids": [list(run.token_ids[job.id][0]) for job in jobs],
        "seconds": run.seconds,
        "cpu_seconds": run.cpu_seconds,
        "engine_steps": run.stats.batch_trajectories.count,
    }


def main() -> None:
    """Answer questions until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dlm", type=Path, required=True)
    parser.add_argument("--rm", type=Path, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cpu")
    pair = load(args.dlm, args.rm, getattr(torch, args.dtype), device)
    warm_up(pair, Workload(best_of=1, prompts=1, max_tokens=8, steps=4))
    rate = gemm_rate(pair.dtype, device)
    print(json.dumps({"ready": True, "threads": torch.get_num_threads(), "gemm_gflops": rate.wall / 1e9}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(pair, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()

"""Parts of `make gpu-check` that say whether results are right."""

from __future__ import annotations

import asyncio
import importlib
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.part import Given, Report
from benchmarks.processes import ROOT, served
from benchmarks.workload import Workload, load, run_engine, run_plain, same_tokens
from demo import bundled_model_path, bundled_reward_models

AGREEMENT = 0.5
"""Of the tokens of golden runs in bfloat16, the share below which something is wrong. Tiny random networks are hard to
round, and a token that comes out otherwise changes all that follow."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """A golden family's runs on the device."""

    family: str
    dtype: str
    runs: int
    same_runs: int
    same_tokens: float


def golden(given: Given) -> Report:
    """The authors' runs again: in float32 token for token, in bfloat16 how many tokens agree."""
    dtypes = (torch.float32, torch.bfloat16)
    found = list(_replayed(given.device, dtypes[:1] if given.tiny else dtypes))
    rows = [
        {"family": each.family, "dtype": each.dtype, "runs": each.runs, "same": each.same_runs}
        | {"same tokens": f"{each.same_tokens:.1%}"}
        for each in found
    ]
    wrong = [
        f"{each.family} in {each.dtype}: {each.same_runs} of {each.runs} runs, {each.same_tokens:.0%} of the tokens"
        for each in found
        if (each.same_runs < each.runs if each.dtype == "float32" else each.same_tokens < AGREEMENT)
    ]
    return {"tables": {"Runs in one crowd": rows}, "wrong": wrong}


def _replayed(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Iterator[Replayed]:
    from transformers.utils import logging

    from tests.support.golden import golden_jobs
    from tests.support.jobs import run
    from tests.support.models import FAMILIES, Pair, judge, load_diffusion, load_reward

    logging.disable_progress_bar()
    for family in FAMILIES:
        for dtype in dtypes:
            loaded = load_diffusion(family, dtype, device=device)
            reward = load_reward(judge(family), dtype, beside=family, device=device)
            pair: Any = Pair(loaded, {"rm": reward}, plain=None)  # type: ignore[arg-type]
            recorded = list(golden_jobs(pair, family))
            results = run(pair, [job for job, *_ in recorded])
            runs = [(results[job.id].trajectories[0].token_ids, tokens) for job, tokens, _ in recorded]
            pairs = [one for got, wanted in runs for one in zip(got, wanted, strict=True)]
            yield Replayed(
                family,
                str(dtype).removeprefix("torch."),
                len(runs),
                sum(list(got) == wanted for got, wanted in runs),
                sum(got == wanted for got, wanted in pairs) / len(pairs),
            )


def plain(given: Given) -> Report:
    """The bundled pair, by the engine in one batch and by the plain loop one after another: in float32 the same."""
    work = Workload(prompts=2, best_of=2, max_tokens=8 if given.tiny else 32, steps=8 if given.tiny else 32)
    pair = load(bundled_model_path(), next(iter(bundled_reward_models().values())), torch.float32, given.device)
    run_engine(pair, work.jobs(pair, 1))  # what is made on first use
    jobs = work.jobs(pair)
    engine, loop = run_engine(pair, jobs), run_plain(pair, jobs)
    same = same_tokens(engine, loop)
    rows = [
        {"way": name, "tokens": run.tokens, "seconds": run.seconds, "tokens/s": run.tokens_per_s}
        for name, run in (("engine", engine), ("plain loop", loop))
    ]
    wrong = [] if same == 1 else [f"{same:.0%} of the trajectories are the same"]
    return {"tables": {f"Bundled models, float32, {same:.0%} of the trajectories the same": rows}, "wrong": wrong}


def http(given: Given) -> Report:
    """A guided request to a server on the device as it comes, twice with one seed; in 16 bits answers may differ."""
    return asyncio.run(_http(given))


async def _http(given: Given) -> Report:
    import httpx

    asked = {"prompt": "Write a short review of a hotel.", "guidance": "entrgi", "best_of": 4, "seed": 7}
    asked |= {"max_tokens": 8} if given.tiny else {}
    name = "cpu" if given.device.type == "cpu" else f"{given.device.type}:{given.device.index or 0}"
    flags = ["--device", name, "--no-spare-worker"]
    async with served(flags) as url, httpx.AsyncClient(base_url=url, timeout=300) as client:
        first, second = [(await client.post("/v1/completions", json=asked)).raise_for_status().json() for _ in range(2)]
        metrics = (await client.get("/metrics")).text
    texts = [answer["choices"][0]["text"] for answer in (first, second)]
    ways = [line for line in metrics.splitlines() if line.startswith(("entrgi:execution_info", "entrgi:kernel_b"))]
    (rewards,) = first["guidance"]["rewards"]
    wrong = [] if texts[0] and all(map(math.isfinite, rewards)) else [f"{texts[0]!r} with the rewards {rewards}"]
    again = "the same again" if texts[0] == texts[1] else f"again: {texts[1]}"
    return {"text": "\n".join([texts[0], f"rewards {rewards}", again, *ways]), "wrong": wrong}


def tests(given: Given) -> Report:
    """Every test that is marked `gpu`; on a CPU the file that has most of them, which skips them."""
    for package in ("pytest", "pytest_timeout", "pytest_asyncio", "hypothesis"):
        importlib.import_module(package)
    paths = ["tests/worker/test_devices.py"] if given.device.type == "cpu" else ["tests"]
    options = ["-m", "gpu", "-q", "--timeout", "900", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *paths, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).strip().splitlines()
    wrong = [] if done.returncode == 0 else [f"pytest ended with status {done.returncode}"]
    return {"text": "\n".join(lines[-40:]), "wrong": wrong}

"""What running two halves of a step at once is worth: seconds of the same guided jobs with it and without, in turn."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoints import Shape, write_dream, write_reward
from server.types import DiffusionParams, GuidanceParams, Job, Message, SamplingParams, WeightedReward
from server.wire.config import WorkerConfig
from server.wire.messages import Failed
from server.worker.overlap import Lanes
from server.worker.runner import Runner
from server.worker.service import load

DIFFUSION = Shape(32_768, 1024, 8, 16, 3072)
REWARD = Shape(32_768, 768, 8, 12, 2304)


@dataclass(frozen=True, slots=True)
class Setup:
    """Random-weight models, and jobs of `best_of` trajectories that make `steps` denoising steps each."""

    diffusion: Shape = DIFFUSION
    reward: Shape = REWARD
    dtype: str = "bfloat16"
    jobs: int = 16
    best_of: int = 2
    tokens: int = 64
    steps: int = 16
    rounds: int = 4


def measure_overlap(device: torch.device, setup: Setup, make_lanes: Callable[[torch.device], Lanes]) -> dict[str, Any]:
    """The best of some rounds, milliseconds a step of all jobs together, with `overlap` and without; the first round of
    each warms up."""
    dtype = getattr(torch, setup.dtype)
    with tempfile.TemporaryDirectory() as folder:
        dlm = write_dream(Path(folder) / "dlm", setup.diffusion, dtype=dtype)
        rm = write_reward(Path(folder) / "rm", setup.reward, dtype=dtype)
        plain = load(
            WorkerConfig(str(dlm), device=str(device), dtype=setup.dtype, reward_models={"rm": str(rm)})
        ).runner
    shared, largest = plain.scheduler.budget, plain.scheduler.largest
    overlapped = Runner(plain.loaded, plain.reward_models, budget=shared, largest=largest, lanes=make_lanes(device))
    best = {"without": float("inf"), "with": float("inf")}
    for number in range(setup.rounds + 1):
        for name, runner in (("without", plain), ("with", overlapped)):
            seconds = _run(runner, setup, device, number)
            if number:
                best[name] = min(best[name], 1e3 * seconds / setup.steps)
    return {f"milliseconds_{name}": round(value, 3) for name, value in best.items()} | {
        "gain": round(best["without"] / best["with"], 3),
        "trajectories": setup.jobs * setup.best_of,
        "gradient_steps": 3,
    }


def _run(runner: Runner, setup: Setup, device: torch.device, number: int) -> float:
    for index in range(setup.jobs):
        conversation = (Message("user", f"Write about {index}, please."),)
        runner.add(
            Job(
                id=f"{number}-{index}",
                prompt_ids=tuple(runner.loaded.tokenizer.render_chat(conversation)),
                sampling=SamplingParams(
                    max_tokens=setup.tokens, best_of=setup.best_of, seed=index, temperature=0.7, ignore_eos=True
                ),
                diffusion=DiffusionParams(steps=setup.steps),
                guidance=GuidanceParams("entrgi", (WeightedReward("rm"),), gradient_steps=3),
                conversation=conversation,
            ),
            runner.clock(),
        )
    _wait(device)
    started = time.perf_counter()
    while runner.has_work:
        for event in runner.step():
            if isinstance(event, Failed):
                raise RuntimeError(event.message)
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

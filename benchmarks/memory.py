"""`python -m benchmarks.memory DLM RM`: peak memory of denoising steps beside what `worker/memory` predicts.

On a GPU torch's own counter is read, on a CPU (Linux) the process's resident memory: run it alone and with
MALLOC_MMAP_THRESHOLD_=65536, so that freed memory goes back and each figure stands for itself. Prints a table, then one
JSON line.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from server.budget import Budget, steered_rows
from server.models.loading import LoadedDiffusionModel, load_diffusion_model
from server.rewards.classifier import find_classifier
from server.rewards.reward_model import RewardModel, load_reward_model
from server.types import DiffusionParams, GuidanceParams, Job, Message, SamplingParams, WeightedReward
from server.worker.memory import FIXED_BYTES, Footprint, cached_share
from server.worker.runner import Runner


@dataclass(frozen=True, slots=True)
class Case:
    """One step: `count` trajectories of `prompt` + `canvas` tokens; M gradient steps (0: unguided), of T steps. With
    `least_steps` every M from there to `gradient_steps` in turn."""

    name: str
    count: int
    prompt: int
    canvas: int
    gradient_steps: int
    steps: int | None = None
    least_steps: int = 0

    def gradient_steps_of(self, index: int) -> int:
        """M of the trajectory with this index."""
        least = self.least_steps or self.gradient_steps
        return least + index % (self.gradient_steps - least + 1)


TEMPLATE_TOKENS = 24  # of a chat template around a conversation, at most

CASES = (
    Case("forward", 16, 240, 1, 0),
    Case("forward, long", 2, 3000, 1, 0),
    Case("unguided rows", 16, 8, 64, 0),
    Case("guided, M = 1", 8, 40, 32, 1),
    Case("guided, M = 3", 8, 40, 32, 3),
    Case("guided, M = 3, more", 32, 40, 32, 3),
    Case("guided, M = 5", 8, 40, 32, 5),
    Case("guided, M = 1 to 5", 16, 40, 32, 5, least_steps=1),
    Case("guided, all revealed", 8, 40, 32, 3, 1),
    Case("guided, long conversation", 8, 1500, 16, 3),
)

LARGE_CASES = (
    Case("forward", 32, 440, 1, 0),
    Case("unguided rows", 128, 8, 64, 0),
    Case("guided", 32, 40, 64, 3),
    Case("guided, M = 2 to 5", 32, 40, 64, 5, least_steps=2),
    Case("guided, M = 4, long conversation", 8, 800, 16, 4),
)
"""For small models: what they take must stand out from what a process takes anyway."""


@dataclass(frozen=True, slots=True)
class Figure:
    """Bytes above what was taken before the step; `fixed` is the part of the prediction that does not grow."""

    case: str
    predicted: int
    measured: int
    fixed: int = FIXED_BYTES


class Meter:
    """The most memory taken since `reset`, in bytes."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None

    def reset(self) -> int:
        """Start over. Returns the bytes that are taken now."""
        gc.collect()
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
            return torch.cuda.memory_allocated(self._cuda)
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")

    def peak(self) -> int:
        """The most bytes that were taken since `reset`."""
        return _status("VmHWM") if self._cuda is None else torch.cuda.max_memory_allocated(self._cuda)


def _status(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {key}")
    return int(found.group(1)) * 1024


def measure(loaded: LoadedDiffusionModel, rewards: dict[str, RewardModel], case: Case) -> Figure:
    """The first step of a case, after one of a small case of its kind."""
    meter = Meter(loaded.model.device)
    _runner(loaded, rewards, Case("", 1, 8, 4, case.gradient_steps)).step()
    runner = _runner(loaded, rewards, case)
    before = meter.reset()
    runner.step()
    return Figure(case.name, predict(loaded, rewards, case), meter.peak() - before)


def predict(loaded: LoadedDiffusionModel, rewards: dict[str, RewardModel], case: Case) -> int:
    """The bytes that `worker/memory` says the case takes at most."""
    footprint = Footprint.of(loaded.model, rewards.values())
    tokens, rows = case.count * (case.prompt + case.canvas), case.count * case.canvas
    after, cached = rows * footprint.logit_row, 0
    if case.gradient_steps:
        (reward,) = rewards.values()
        cached = case.prompt + TEMPLATE_TOKENS
        passed = case.count * (case.canvas + TEMPLATE_TOKENS + math.ceil(cached * cached_share(reward)))
        steered = steered_rows(rows, case.gradient_steps)
        after = steered * footprint.guided_row + passed * footprint.reward_token
    step = max(tokens * footprint.token, after) + tokens * footprint.hidden
    return int(step + case.count * cached * footprint.cached_token) + FIXED_BYTES


def _runner(loaded: LoadedDiffusionModel, rewards: dict[str, RewardModel], case: Case) -> Runner:
    """A runner before its first step, with one job a trajectory: equal canvases would share a forward."""
    runner = Runner(loaded, rewards, budget=Budget(*(1 << 30,) * 6))
    weights = tuple(WeightedReward(name) for name in rewards)
    for index in range(case.count):
        guidance = GuidanceParams("entrgi", weights, gradient_steps=case.gradient_steps_of(index))
        text = chr(ord("a") + index % 26) + chr(ord("a") + index // 26) + "c" * (case.prompt - 2)
        runner.add(
            Job(
                id=str(index),
                prompt_ids=tuple(loaded.tokenizer.encode(text)),
                sampling=SamplingParams(max_tokens=case.canvas),
                diffusion=DiffusionParams(case.steps or case.canvas),
                guidance=guidance if case.gradient_steps else GuidanceParams(),
                conversation=(Message("user", text),),
            ),
            now=0.0,
        )
    return runner


def main() -> None:
    """Measure all cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dlm")
    parser.add_argument("rm")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--large", action="store_true", help="fewer cases with more in each, for small models")
    given = parser.parse_args()
    device, dtype = torch.device(given.device), getattr(torch, given.dtype)
    loaded = load_diffusion_model(given.dlm, dtype=dtype, device=device)
    reward = load_reward_model(
        find_classifier("rm", given.rm),
        diffusion_tokenizer=loaded.tokenizer,
        diffusion_vocab_size=loaded.model.vocab_size,
        dtype=dtype,
        device=device,
    )
    figures = [measure(loaded, {"rm": reward}, case) for case in (LARGE_CASES if given.large else CASES)]
    print(f"{'case':32} {'predicted':>12} {'measured':>12}  MB")
    for figure in figures:
        print(f"{figure.case:32} {figure.predicted / 1e6:12.1f} {figure.measured / 1e6:12.1f}")
    print(json.dumps([asdict(figure) for figure in figures]))


if __name__ == "__main__":
    main()

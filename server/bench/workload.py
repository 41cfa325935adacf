"""What the offline benchmarks run: a loaded pair, and lists of jobs on it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from server.engine.messages import Failed, Finished
from server.engine.runner import Runner
from server.guidance.plain import PlainLoop, PlainReward
from server.models.loading import LoadedDiffusionModel, load_diffusion_model
from server.rewards.reward_model import RewardModel, load_reward_model
from server.types import (
    DiffusionParams,
    GuidanceParams,
    Job,
    JobResult,
    Message,
    Method,
    SamplingParams,
    WeightedReward,
)

SUBJECTS = ("hotel", "book", "phone", "film", "bakery", "museum", "train", "camera")


@dataclass(frozen=True, slots=True)
class Pair:
    """One diffusion model and one reward model named `rm`, with the plain loop over the same weights."""

    loaded: LoadedDiffusionModel
    reward: RewardModel | None
    plain: PlainLoop


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts x K trajectories with everything else fixed; the defaults are the headline case."""

    method: Method = "entrgi"
    prompts: int = 4
    best_of: int = 4
    max_tokens: int = 64
    steps: int = 32
    gradient_steps: int = 3
    temperature: float = 0.7
    top_p: float = 0.95
    prompt_words: int = 12
    algorithm: str = "entropy"

    @property
    def tokens(self) -> int:
        """Canvas tokens that the whole workload fills."""
        return self.prompts * self.best_of * self.max_tokens

    def jobs(self, pair: Pair) -> list[Job]:
        """The jobs, one a prompt, all different."""
        rewards = () if self.method == "none" else (WeightedReward("rm"),)
        jobs = []
        for index in range(self.prompts):
            words = ["Write", "a", "review", "of", "the", SUBJECTS[index % len(SUBJECTS)], str(index)]
            words += ["please"] * max(0, self.prompt_words - len(words))
            conversation = (Message("user", " ".join(words)),)
            jobs.append(
                Job(
                    id=f"bench-{index}",
                    prompt_ids=tuple(pair.loaded.tokenizer.render_chat(conversation)),
                    conversation=conversation,
                    sampling=SamplingParams(
                        max_tokens=self.max_tokens,
                        temperature=self.temperature,
                        top_p=self.top_p,
                        seed=index,
                        n=self.best_of if self.method == "none" else 1,
                        best_of=self.best_of,
                        ignore_eos=True,
                    ),
                    diffusion=DiffusionParams(steps=self.steps, algorithm=self.algorithm),  # type: ignore[arg-type]
                    guidance=GuidanceParams(self.method, rewards, self.gradient_steps),
                )
            )
        return jobs


def load(dlm: Path, rm: Path | None, dtype: torch.dtype, device: torch.device) -> Pair:
    """Load a pair for the engine and, through stock transformers, for the plain loop."""
    from transformers import AutoModelForSequenceClassification

    loaded = load_diffusion_model(str(dlm), dtype=dtype, device=device)
    reward, plain = None, {}
    if rm is not None:
        reward = load_reward_model(
            "rm",
            str(rm),
            diffusion_tokenizer=loaded.tokenizer,
            diffusion_vocab_size=loaded.model.vocab_size,
            dtype=dtype,
            device=device,
        )
        stock = AutoModelForSequenceClassification.from_pretrained(rm, dtype=dtype).to(device)
        plain["rm"] = PlainReward(stock.eval().requires_grad_(False), reward.tokenizer, reward.table)
    return Pair(loaded, reward, PlainLoop(loaded.model, loaded.tokenizer, loaded.info, plain))


def run_engine(pair: Pair, jobs: Sequence[Job]) -> tuple[float, dict[str, JobResult]]:
    """Seconds and results of all jobs submitted at once."""
    runner = Runner(pair.loaded, {} if pair.reward is None else {"rm": pair.reward})
    started = time.perf_counter()
    results: dict[str, JobResult] = {}
    for job in jobs:
        runner.add(job, now=time.time())
    while runner.has_work:
        for event in runner.step():
            if isinstance(event, Failed):
                raise RuntimeError(event.message)
            if isinstance(event, Finished):
                results[event.job_id] = event.result
    return time.perf_counter() - started, results


def run_one_by_one(pair: Pair, jobs: Sequence[Job]) -> tuple[float, dict[str, JobResult]]:
    """The engine again, each job only after the one before: a single client."""
    seconds = 0.0
    results: dict[str, JobResult] = {}
    for job in jobs:
        taken, result = run_engine(pair, [job])
        seconds += taken
        results |= result
    return seconds, results


def run_plain(pair: Pair, jobs: Sequence[Job]) -> tuple[float, dict[str, list[list[int]]]]:
    """Seconds and canvas tokens of the plain loop, one job after another."""
    started = time.perf_counter()
    tokens = {job.id: pair.plain.run(job).token_ids for job in jobs}
    return time.perf_counter() - started, tokens


def count_flops(pair: Pair, jobs: Sequence[Job]) -> int:
    """Floating-point operations of the matrix products and attentions that the engine really runs on these jobs."""
    with FlopCounterMode(display=False) as counter:
        run_engine(pair, jobs)
    return int(counter.get_total_flops())


def gemm_rate(dtype: torch.dtype, device: torch.device, size: int = 1024, seconds: float = 1.0) -> float:
    """The machine's matrix-product rate in FLOP/s, the best of many products of `size` cubed."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best

"""What the offline benchmarks run: a loaded pair, lists of jobs on it, and one run of them with its clock readings."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.flops import Flops, recording
from benchmarks.machine import Stopwatch
from kernels.dispatch import choose_products
from server.budget import Budget
from server.guidance.plain import PlainLoop, PlainReward
from server.models.loading import LoadedDiffusionModel
from server.rewards.reward_model import RewardModel
from server.types import (
    Algorithm,
    DiffusionParams,
    GuidanceParams,
    Job,
    JobResult,
    Message,
    SamplingParams,
    WeightedReward,
)
from server.wire.config import RewardSource, WorkerConfig
from server.wire.messages import Failed, Finished
from server.wire.stats import RunnerStats
from server.worker import service
from server.worker.runner import Runner
from server.worker.savings import Savings

NAMES: dict[torch.dtype, Any] = {getattr(torch, name): name for name in ("bfloat16", "float32", "float64")}
SUBJECTS = ("hotel", "book", "phone", "film", "bakery", "museum", "train", "camera")


@dataclass(frozen=True, slots=True)
class Pair:
    """One diffusion model and one reward model named `rm`, with the plain loop over the same weights."""

    loaded: LoadedDiffusionModel
    reward: RewardModel | None
    plain: PlainLoop
    budgets: tuple[Budget, Budget]  # what may share a step, and what one trajectory may take

    @property
    def device(self) -> torch.device:
        """The device that holds the weights."""
        return self.loaded.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The diffusion model's dtype."""
        return self.loaded.model.dtype


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts x K trajectories with everything else fixed; the defaults are the headline case.

    A prompt is a sentence of `prompt_words` words through the chat template, or, with `prompt_tokens`, that many
    random ids. `max_tokens` is L, `steps` T, `best_of` K, `gradient_steps` M; with `least_gradient_steps` every M from
    there on in turn. `text_only` asks for texts, which may end early, and not for all L tokens.
    """

    method: str = "entrgi"
    prompts: int = 4
    best_of: int = 4
    max_tokens: int = 64
    steps: int = 32
    gradient_steps: int = 3
    least_gradient_steps: int | None = None
    temperature: float = 0.7
    top_p: float = 0.95
    prompt_words: int = 12
    prompt_tokens: int | None = None
    algorithm: Algorithm = "entropy"
    text_only: bool = False

    @property
    def tokens(self) -> int:
        """Canvas tokens that the whole workload fills."""
        return self.prompts * self.best_of * self.max_tokens

    def jobs(self, pair: Pair, request_set: int = 0) -> list[Job]:
        """The jobs, one a prompt, all different. Another `request_set` has other seeds and other prompts of the same
        lengths."""
        return [self._job(pair, request_set, index) for index in range(self.prompts)]

    def _job(self, pair: Pair, request_set: int, index: int) -> Job:
        number = request_set * 1000 + index
        words = ["Write", "a", "review", "of", "the", SUBJECTS[index % len(SUBJECTS)], f"{number:06d}"]
        words += ["please"] * max(0, self.prompt_words - len(words))
        conversation = (Message("user", " ".join(words)),)
        if self.prompt_tokens is None:
            prompt = pair.loaded.tokenizer.render_chat(conversation)
        else:
            generator, vocab_size = random.Random(number), pair.loaded.info.vocab_size
            prompt = [generator.randrange(vocab_size) for _ in range(self.prompt_tokens)]
        rewards = () if self.method == "none" else (WeightedReward("rm"),)
        least = self.gradient_steps if self.least_gradient_steps is None else self.least_gradient_steps
        return Job(
            id=f"{self.method}-{number}",
            prompt_ids=tuple(prompt),
            conversation=conversation,
            sampling=SamplingParams(
                max_tokens=self.max_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                seed=number,
                n=self.best_of if self.method == "none" else 1,
                best_of=self.best_of,
                ignore_eos=not self.text_only,
            ),
            diffusion=DiffusionParams(steps=self.steps, algorithm=self.algorithm),
            guidance=GuidanceParams(self.method, rewards, least + index % (self.gradient_steps - least + 1)),
        )


@dataclass(frozen=True, slots=True)
class Run:
    """Some jobs, done. Seconds of wall and CPU time; tokens (L each, or those of
    the text) by job and trajectory; the engine's phase timers
    and the operations counted from shapes (neither for the plain loop); the part of `rest` that ran cached prefixes."""

    seconds: float
    cpu_seconds: float
    token_ids: Mapping[str, tuple[tuple[int, ...], ...]]
    stats: RunnerStats | None = None
    flops: Flops | None = None
    prefix_seconds: float = 0.0

    @property
    def reward_seconds(self) -> float:
        """Wall seconds inside the reward model: passes forward and back, and cached prefixes."""
        phases = self.phases()
        return phases["reward forward"] + phases["reward backward"] + self.prefix_seconds

    @property
    def tokens(self) -> int:
        """Canvas tokens that were filled."""
        return sum(len(tokens) for trajectories in self.token_ids.values() for tokens in trajectories)

    @property
    def tokens_per_s(self) -> float:
        """Canvas tokens a second of wall time, of all trajectories."""
        return self.tokens / self.seconds

    def phases(self) -> dict[str, float]:
        """Wall seconds by phase; what no timer covers (drawing, ranking, queue, final scores) is `rest`."""
        if self.stats is None:
            return {}
        stats = self.stats
        forward, backward = stats.reward_forward_seconds.total, stats.reward_backward_seconds.total
        diffusion, guidance = stats.model_forward_seconds.total, stats.guidance_seconds.total
        return {
            "diffusion": diffusion,
            "vocabulary": max(guidance - forward - backward, 0.0),
            "reward forward": forward,
            "reward backward": backward,
            "rest": max(self.seconds - diffusion - guidance, 0.0),
        }

    def plus(self, other: Run) -> Run:
        """The run that is this one and then the other."""
        stats = self.stats.plus(other.stats) if self.stats and other.stats else None
        flops = self.flops.plus(other.flops) if self.flops and other.flops else None
        return Run(
            self.seconds + other.seconds,
            self.cpu_seconds + other.cpu_seconds,
            {**self.token_ids, **other.token_ids},
            stats,
            flops,
            self.prefix_seconds + other.prefix_seconds,
        )


def load(dlm: Path, rm: Path | None, dtype: torch.dtype, device: torch.device) -> Pair:
    """Load a pair for the engine, as a worker does, and through stock transformers for the plain loop."""
    from transformers import AutoModelForSequenceClassification

    config = WorkerConfig(
        str(dlm),
        () if rm is None else (RewardSource("rm", str(rm)),),
        device=str(device),
        dtype=NAMES[dtype],
        threads=torch.get_num_threads(),
    )
    runner = service.load(config).runner
    loaded, reward, plain = runner.loaded, runner.reward_models.get("rm"), {}
    if reward is not None:
        stock = AutoModelForSequenceClassification.from_pretrained(rm, dtype=dtype).to(device)
        plain["rm"] = PlainReward(stock.eval().requires_grad_(False), reward.tokenizer, reward.table, reward.padding)
    budgets = runner.book.budget, runner.book.largest
    return Pair(loaded, reward, PlainLoop(loaded.model, loaded.tokenizer, loaded.info, plain), budgets)


def engine_runner(pair: Pair, savings: Savings | None = None) -> Runner:
    """A runner over the pair, within the budgets and with the kernels that a server would have."""
    shared, largest = pair.budgets
    rewards = {} if pair.reward is None else {"rm": pair.reward}
    model, widths = pair.loaded.model, [reward.table.shape[1] for reward in rewards.values()]
    products = choose_products(
        "auto", model.device, model.activation_dtype, model.vocab_size, widths, shared.guided_rows
    )
    return Runner(pair.loaded, rewards, budget=shared, largest=largest, savings=savings, backend=products.backend)


def run_to_end(runner: Runner, jobs: Sequence[Job]) -> dict[str, JobResult]:
    """Queue the jobs and step until all are answered; results by job id. RuntimeError when one fails."""
    results: dict[str, JobResult] = {}
    for job in jobs:
        runner.add(job, now=time.time())
    while runner.has_work:
        for event in runner.step():
            if isinstance(event, Failed):
                raise RuntimeError(event.message)
            if isinstance(event, Finished):
                results[event.job_id] = event.result
    return results


def run_engine(pair: Pair, jobs: Sequence[Job], savings: Savings | None = None) -> Run:
    """A run of all jobs, submitted at once to a fresh queue."""
    runner = engine_runner(pair, savings)
    with recording(pair.loaded.model, pair.reward) as recorder:
        watch = Stopwatch(pair.device)
        results = run_to_end(runner, jobs)
        seconds, cpu_seconds = watch.read()
    tokens = {
        job_id: tuple(each.token_ids[: each.completion_tokens] for each in result.trajectories)
        for job_id, result in results.items()
    }
    return Run(seconds, cpu_seconds, tokens, runner.stats, recorder.count(), recorder.prefix_seconds)


def run_one_by_one(pair: Pair, jobs: Sequence[Job], savings: Savings | None = None) -> Run:
    """The engine again, each job only after the one before: a single client."""
    run = run_engine(pair, jobs[:1], savings)
    for job in jobs[1:]:
        run = run.plus(run_engine(pair, [job], savings))
    return run


def run_plain(pair: Pair, jobs: Sequence[Job]) -> Run:
    """The plain loop, one job after another."""
    watch = Stopwatch(pair.device)
    tokens = {job.id: tuple(tuple(ids) for ids in pair.plain.run(job).token_ids) for job in jobs}
    seconds, cpu_seconds = watch.read()
    return Run(seconds, cpu_seconds, tokens)


def only_first_trajectory(job: Job) -> Job:
    """The same job with K = 1: its trajectory is the first of the whole job's, token for token."""
    return replace(job, sampling=replace(job.sampling, n=1, best_of=1))


def same_tokens(run: Run, other: Run) -> float:
    """Share of the trajectories that both runs have whose tokens are all equal."""
    same = [
        mine == theirs
        for job_id in run.token_ids.keys() & other.token_ids.keys()
        for mine, theirs in zip(run.token_ids[job_id], other.token_ids[job_id], strict=False)
    ]
    if not same:
        raise ValueError("the runs have no trajectory in common")
    return sum(same) / len(same)

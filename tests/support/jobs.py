"""Jobs as the API would make them, and what becomes of them in a runner of this process."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from server.errors import InvalidRequest
from server.text.tokenizer import Tokenizer
from server.types import DiffusionParams, GuidanceParams, Job, JobResult, Message, SamplingParams, WeightedReward
from server.wire.messages import Failed, Finished
from server.worker.runner import Runner
from tests.support.models import Pair

PARTS = (SamplingParams, DiffusionParams, GuidanceParams)


def make_job(name: str = "job", prompt: str = "Hi", tokenizer: Tokenizer | None = None, **values: Any) -> Job:
    """A chat job. Each value goes to the parameter block, or else to the job, that has a field of its name; a `stop`
    that is a number is guidance's, any other is the strings. By default 8 tokens, all of which are asked for, in as
    many steps, seed 0, and for any method but `none` the reward model `rm` (reward models may be given by name alone,
    with weight 1).
    Without a tokenizer the prompt's ids are made up from the seed, and fit any golden model."""
    values.setdefault("max_tokens", 8)
    values.setdefault("steps", values["max_tokens"])
    if values.get("method", "none") != "none":
        values.setdefault("reward_models", ("rm",))
    if "reward_models" in values:
        rewards = values["reward_models"]
        values["reward_models"] = tuple(WeightedReward(r) if isinstance(r, str) else r for r in rewards)
    blocks: list[Any] = []
    for kind in PARTS:
        names = {field.name for field in fields(kind)}
        if kind is SamplingParams and isinstance(values.get("stop"), float):
            names.remove("stop")
        blocks.append(kind(**{key: values.pop(key) for key in list(values) if key in names}))
    conversation = (Message("user", prompt),)
    seed = blocks[0].seed
    made_up = tuple(5 + (seed * 7 + index) % 400 for index in range(4 + seed % 3))
    values.setdefault("prompt_ids", tuple(tokenizer.render_chat(conversation)) if tokenizer else made_up)
    values.setdefault("conversation", conversation)
    values.setdefault("return_token_ids", True)
    return Job(name, sampling=blocks[0], diffusion=blocks[1], guidance=blocks[2], **values)


def finish(runner: Runner, jobs: Iterable[Job]) -> tuple[dict[str, JobResult], dict[str, Failed]]:
    """All jobs at once, until nothing is left: each one's result or failure, by its id. Afterwards nothing may be
    queued or running."""
    finished: dict[str, JobResult] = {}
    failed: dict[str, Failed] = {}
    for job in jobs:
        try:
            runner.add(job, now=0.0)
        except InvalidRequest as error:
            failed[job.id] = Failed(job.id, error.kind, error.message, error.param)
    while runner.has_work:
        for event in runner.step():
            if isinstance(event, Finished):
                finished[event.job_id] = event.result
            elif isinstance(event, Failed):
                failed[event.job_id] = event
    assert (runner.stats.running, runner.stats.waiting) == (0, 0)
    return finished, failed


def run(pair: Pair, jobs: Iterable[Job], *, rewards: Any = None, **options: Any) -> dict[str, JobResult]:
    """Each job's result, in a fresh runner with these options and the pair's reward models or others. None may fail."""
    finished, failed = finish(Runner(pair.loaded, pair.rewards if rewards is None else rewards, **options), jobs)
    assert not failed, failed
    return finished


def answers(runner: Runner, jobs: Iterable[Job]) -> tuple[dict[str, list[tuple[int, ...]]], dict[str, Failed]]:
    """Token ids of the trajectories of each job that finished, and the failures."""
    finished, failed = finish(runner, jobs)
    return {name: [one.token_ids for one in result.trajectories] for name, result in finished.items()}, failed

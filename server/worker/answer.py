"""The answer of a job whose trajectories have all ended: texts, their rewards, and which are chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from server.guidance.best_of import choose
from server.models.loading import LoadedDiffusionModel
from server.rewards.reward_model import RewardModel
from server.text.response import FinishedText, finish_text
from server.types import Job, JobResult, TrajectoryResult
from server.worker.book import Entry
from server.worker.trajectory import Trajectory


def answer(
    entry: Entry,
    loaded: LoadedDiffusionModel,
    reward_models: Mapping[str, RewardModel],
    now: float,
    *,
    one_by_one: bool = False,
) -> JobResult:
    """The result of a job; `one_by_one` reads its final rewards in more passes, which takes less memory."""
    job, weighted = entry.job, entry.job.guidance.reward_models
    trajectories = [entry.finished[index] for index in range(job.sampling.best_of)]
    texts = [_text(trajectory, loaded, entry.stopped) for trajectory in trajectories]
    rewards = _final_rewards(job, [text.text for text in texts], reward_models, one_by_one)
    results = [
        TrajectoryResult(
            index=trajectory.index,
            token_ids=tuple(trajectory.tokens[: trajectory.length].tolist()),
            text=text.text,
            finish_reason=text.finish_reason,
            completion_tokens=text.completion_tokens,
            stop_reason=text.stop_reason,
            step_map=tuple(trajectory.step_map[: trajectory.length].tolist()) if job.return_step_map else (),
            model_calls=trajectory.taken * (2 if job.diffusion.cfg_scale else 1),
            reward_calls=trajectory.reward_calls,
            reward=math.fsum(each.weight * reward[each.model] for each in weighted) if weighted else None,
            rewards=dict[str, float | None](reward),
            trace=tuple(trajectory.trace),
        )
        for trajectory, text, reward in zip(trajectories, texts, rewards, strict=True)
    ]
    taken = max(trajectory.taken for trajectory in trajectories)
    started_at = now if entry.started_at is None else entry.started_at
    return JobResult(
        trajectories=tuple(results),
        chosen=choose([result.reward for result in results], job.sampling.n, ranked=job.guidance.method != "none"),
        steps=taken if job.diffusion.adaptive else job.diffusion.steps,
        queue_ms=1e3 * (started_at - entry.queued_at),
        generation_ms=1e3 * (now - started_at),
    )


def _text(trajectory: Trajectory, loaded: LoadedDiffusionModel, stopped: str | None) -> FinishedText:
    """The text of a canvas; of one that a deadline cut, the part before its first masked position."""
    sampling = trajectory.job.sampling
    length = trajectory.length
    known = int(trajectory.masked.argmax()) if trajectory.left else length
    tokens = trajectory.tokens[:known].tolist()
    text = finish_text(loaded.tokenizer, tokens, loaded.info.stop_token_ids, sampling.stop, sampling.ignore_eos)
    if stopped and text.finish_reason == "length" and known < length:
        return FinishedText(text.text, "length", stopped, text.completion_tokens)
    return text


def _final_rewards(
    job: Job, texts: Sequence[str], reward_models: Mapping[str, RewardModel], one_by_one: bool
) -> list[dict[str, float]]:
    """R on the text of every trajectory (algorithm.md, end of section 2), by reward model."""
    rewards: list[dict[str, float]] = [{} for _ in texts]
    whole = [job.response_prefix + text + job.response_suffix for text in texts]
    for weighted in job.guidance.reward_models:
        model = reward_models[weighted.model]
        sequences = [model.sequence(job.conversation, text) for text in whole]
        packs = [[sequence] for sequence in sequences] if one_by_one else [sequences]
        scores = [score for pack in packs for score in model.score(pack).tolist()]
        for reward, score in zip(rewards, scores, strict=True):
            reward[weighted.model] = float(score)
    return rewards

"""The answer of a job whose trajectories have all ended: texts, their rewards, and which are chosen."""

from __future__ import annotations

from collections.abc import Sequence

from server.guidance.best_of import choose, total_reward
from server.models.loading import LoadedDiffusionModel
from server.text.response import FinishedText, finish_text
from server.types import JobResult, TrajectoryResult
from server.worker.book import Entry, Rewards
from server.worker.trajectory import Trajectory


def answer(entry: Entry, texts: Sequence[FinishedText], rewards: Rewards, now: float) -> JobResult:
    """The result of a job with the final texts of its K trajectories and their rewards. Raises NotFinite where no
    weights follow from these."""
    job, particles = entry.job, entry.particles
    trajectories = [entry.finished[index] for index in range(job.sampling.best_of)]
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
            reward=total_reward(job.guidance.rewards, reward),
            rewards=dict(reward),
            trace=tuple(trajectory.trace),
        )
        for trajectory, text, reward in zip(trajectories, texts, rewards, strict=True)
    ]
    taken = max(trajectory.taken for trajectory in trajectories)
    totals = scores = [result.reward for result in results]
    if job.guidance.resampled_by == "confidence":
        scores = [trajectory.log_probability for trajectory in trajectories]
    ranking = totals if job.guidance.rewards else scores
    started_at = now if entry.started_at is None else entry.started_at
    return JobResult(
        trajectories=tuple(results),
        chosen=choose(ranking, job.sampling.n, ranked=job.guidance.method != "none"),
        steps=taken if job.diffusion.adaptive else job.diffusion.steps,
        queue_ms=1e3 * (started_at - entry.queued_at),
        generation_ms=1e3 * (now - started_at),
        resampled=tuple(particles.resampled) if particles else (),
        weights=particles.weights(scores) if particles else None,
    )


def final_text(trajectory: Trajectory, loaded: LoadedDiffusionModel, stopped: str | None) -> FinishedText:
    """The text of a canvas; of one that a deadline cut, the part before its first masked position."""
    sampling = trajectory.job.sampling
    length = trajectory.length
    known = int(trajectory.masked.argmax()) if trajectory.left else length
    tokens = trajectory.tokens[:known].tolist()
    text = finish_text(loaded.tokenizer, tokens, loaded.info.stop_token_ids, sampling.stop, sampling.ignore_eos)
    if stopped and text.finish_reason == "length" and known < length:
        return FinishedText(text.text, "length", stopped, text.completion_tokens)
    return text

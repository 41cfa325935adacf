"""The K trajectories of a job as particles, in the engine: when they meet, what each would say now, and which go on
(algorithm.md, section 5). All on the host.

They are admitted together, and each takes part in every step until it is finished, so those that go on have always
taken equally many: there is no barrier at which one would have to wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from server.guidance.best_of import total_reward
from server.guidance.resample import Meeting, Particles
from server.models.loading import LoadedDiffusionModel
from server.text.response import finish_text
from server.wire.messages import Canvas, Event
from server.wire.stats import RunnerStats
from server.worker.book import Entry
from server.worker.judge import Judge
from server.worker.trajectory import Trajectory


def meet(
    entry: Entry,
    particles: Particles,
    loaded: LoadedDiffusionModel,
    judge: Judge,
    stats: RunnerStats,
    events: list[Event],
) -> None:
    """Resample the trajectories of a job if they are due for it, unless outside scorers have to be asked first. The
    texts of other jobs are not read in the same pass: rewards must not depend, in rounding, on what else is here.
    Raises NotFinite."""
    if (taken := due(entry, particles)) is None:
        return
    job, trajectories = entry.job, [entry.running[index] for index in range(entry.job.sampling.best_of)]
    scores = [trajectory.log_probability for trajectory in trajectories]
    if particles.rule.by == "reward":
        rewards = judge.judge(entry, taken, [text_now(each, loaded) for each in trajectories], events)
        if rewards is None:
            return
        totals = [total_reward(job.guidance.rewards, each) for each in rewards]
        scores = [total for total in totals if total is not None]
        for trajectory in trajectories:
            trajectory.reward_calls += len(job.guidance.rewards)
    meeting = resample(entry, particles, taken, scores)
    for index, ancestor in enumerate(meeting.ancestors or ()):
        child = entry.running[index]
        if job.stream_canvas and ancestor != index and child.next_step() is None:  # no step will show it
            last = int(child.step_map.max())
            events.append(Canvas(job.id, index, last, child.shown, reward=child.last_reward, ancestor=ancestor))
    stats.effective_share.add(meeting.share)
    stats.resamplings += meeting.ancestors is not None


def due(entry: Entry, particles: Particles) -> int | None:
    """After how many steps the trajectories meet, if they do now: not where nothing is masked any more."""
    going = [trajectory for trajectory in entry.running.values() if trajectory.next_step() is not None]
    if not going or going[0].taken % particles.rule.every or going[0].taken == particles.met:
        return None
    return going[0].taken


def text_now(trajectory: Trajectory, loaded: LoadedDiffusionModel) -> str:
    """What a trajectory would say now, ended and cut as a final text is: the best guess where it is masked."""
    sampling, tokens = trajectory.job.sampling, trajectory.tokens
    if trajectory.left and trajectory.estimate is not None:
        tokens = trajectory.estimate
    ends = loaded.info.stop_token_ids, sampling.stop, sampling.ignore_eos
    return finish_text(loaded.tokenizer, tokens[: trajectory.length].tolist(), *ends).text


def resample(entry: Entry, particles: Particles, step: int, scores: Sequence[float]) -> Meeting:
    """Let the trajectories meet, and copies go on in the places of those that end. Raises NotFinite."""
    meeting = particles.meet(step, scores)
    before = dict(entry.running)
    for index, trajectory in before.items():
        if trajectory.job.trace:
            # Steps that were passed over have no entropy.
            last = max(place for place, each in enumerate(trajectory.trace) if each.mean_entropy is not None)
            trajectory.trace[last] = replace(
                trajectory.trace[last],
                reward_estimate=scores[index],
                log_weight=meeting.log_weights[index],
                ancestor=index,
            )
    for index, ancestor in enumerate(meeting.ancestors or ()):
        if ancestor != index:
            entry.running[index] = before[ancestor].child(index)
    if all(trajectory.next_step() is None for trajectory in entry.running.values()):
        entry.admitted = len(before)  # all are copies of finished ones: to end it needs no room
    return meeting

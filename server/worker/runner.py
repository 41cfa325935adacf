"""The engine's inner half: jobs in, one denoising step at a time, events out. Lives in the worker process.

`Runner.step` is the whole system in one function: expire, meet, admit, denoise, retire. The book (worker/book) says
which trajectories take part, and the `Denoiser` (worker/step) does the tensor work. What goes wrong with one job fails
that job alone; what goes wrong in the step that many share fails all that take part in it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

from server.budget import Budget
from server.diffusion.schedule import Step
from server.errors import AdapterGone
from server.guidance.resample import Particles
from server.models.loading import LoadedDiffusionModel
from server.models.lora import Adapter
from server.rewards.reward_model import RewardModel
from server.rewards.text_reward import TextReward
from server.types import Job
from server.wire.messages import Canvas, Event, Failed, Finished, Judged, Progress, Started, Timed
from server.wire.stats import RunnerStats, resident_bytes
from server.worker.answer import answer, final_text
from server.worker.book import Book, Entry
from server.worker.demand import Demand
from server.worker.failures import Attempt, failed, is_out_of_memory, out_of_memory
from server.worker.judge import Judge
from server.worker.meeting import meet
from server.worker.memory import held_bytes
from server.worker.reveal import Decision
from server.worker.savings import Savings
from server.worker.step import Denoiser
from server.worker.trajectory import Trajectory

logger = logging.getLogger(__name__)

TIMED_STEPS = 16  # of a job, about: each makes four spans


class Runner:
    """The jobs and the models of one device; `scorers` are the rewards without a gradient that it has. `begin` is
    called with a job's id before anything is computed for it. `backend` is that of `kernels`, chosen by device and
    dtype where it is None."""

    def __init__(
        self,
        loaded: LoadedDiffusionModel,
        reward_models: Mapping[str, RewardModel],
        scorers: Mapping[str, TextReward] | None = None,
        *,
        budget: Budget | None = None,
        largest: Budget | None = None,
        savings: Savings | None = None,
        backend: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.loaded = loaded
        self.reward_models = dict(reward_models)
        self.book = Book(budget or Budget(), largest)
        self.savings = savings or Savings()
        self.denoiser = Denoiser(loaded.model, loaded.info, self.reward_models, self.savings, budget, backend)
        self.demand = Demand(loaded, self.reward_models, self.savings, scorers or {})
        self.judge = Judge({**self.reward_models, **(scorers or {})}, self.denoiser.ran_out)
        self.clock = clock
        self.adapters: dict[str, Adapter] = {}  # by version
        self.begin: Callable[[str], None] = lambda job_id: None

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do: not where all that is here waits for outside scorers."""
        return any(entry.asked is None for entry in self.book)

    @property
    def stats(self) -> RunnerStats:
        """Counters since start and gauges of this moment."""
        stats = self.denoiser.stats
        stats.running, stats.waiting = self.book.running, self.book.waiting
        stats.resident_bytes, stats.device_bytes = resident_bytes(), held_bytes(self.denoiser.device)
        return stats

    def add(self, job: Job, now: float) -> None:
        """Queue a job. Raises InvalidRequest for one that can never run, AdapterGone where its adapter is not here."""
        if job.adapter is not None and job.adapter not in self.adapters:
            raise AdapterGone("the adapter was replaced or unloaded after this request was accepted; send it again")
        self.book.add(job, self.demand.cost(job), now, self.adapters[job.adapter] if job.adapter else None)

    def cancel(self, job_id: str) -> bool:
        """Forget a job before the next denoising step; no event follows. Returns whether it was known."""
        return self.book.drop(job_id)

    def judged(self, message: Judged) -> None:
        """Go on with the job that has asked for these scores; any other is left as it is."""
        entry = self.book.get(message.job_id)
        if entry is None or entry.asked != message.step:
            return
        entry.asked, entry.heard = None, message.scores
        if message.scores is None:
            entry.stopped = "deadline"

    def step(self) -> list[Event]:
        """One pass: expire, let trajectories meet, admit, denoise every running one by one step, retire. Returns what
        happened."""
        events: list[Event] = []
        self._expire(events)
        self._meet(events)
        self._start(list(iter(self.book.admit, None)), events)
        self._denoise(events)
        for entry in self.book:
            with self._alone(entry, events):
                self._retire(entry, events)
        return events

    # -- the stages of a step ------------------------------------------------------------------------------------

    def _expire(self, events: list[Event]) -> None:
        """Jobs past their deadline: queued ones fail, running ones end with what is there."""
        now = self.clock()
        for entry in self.book:
            job = entry.job
            if job.deadline is None or now < job.deadline or entry.asked is not None:
                continue
            if entry.started_at is not None:
                entry.stopped = "deadline"
            else:
                self.book.drop(job.id)
                events.append(Failed(job.id, "deadline", "the deadline passed while the request was queued", "timeout"))

    def _meet(self, events: list[Event]) -> None:
        """Resample the trajectories of jobs that are due for it, unless outside scorers have to be asked first."""
        for entry in self.book:
            if entry.particles is not None and entry.asked is None and not entry.stopped:
                with self._alone(entry, events):
                    meet(entry, entry.particles, self.loaded, self.judge, self.denoiser.stats, events)

    def _start(self, admitted: Sequence[tuple[Entry, range]], events: list[Event]) -> None:
        """Begin trajectories, or go on with those of a job that was parked; the conversations of jobs that begin with
        them are run together."""
        arriving = [entry for entry, indices in admitted if indices.start == 0]
        for entry in arriving:
            self.begin(entry.job.id)
        self._prepare(arriving, events)
        for entry in arriving:
            if entry.job.id in self.book and entry.started_at is None:
                entry.started_at = self.clock()
                events.append(Started(entry.job.id))
                if (rule := entry.job.guidance.resample) is not None:
                    entry.particles = Particles.of(entry.job, rule)
        for entry, indices in admitted:
            if entry.job.id in self.book:
                with self._alone(entry, events):
                    prepared = entry.contexts, entry.prefix, entry.adapter
                    for index in indices:
                        if index in entry.running:
                            entry.running[index].contexts = dict(entry.contexts)
                        else:
                            entry.running[index] = Trajectory.start(entry.job, index, self.loaded.info, *prepared)

    def _prepare(self, entries: Sequence[Entry], events: list[Event]) -> None:
        """All at once; where that fails, one after another, which shows whose fault it is or takes less memory."""
        alone = self._alone(entries[0], events) if len(entries) == 1 else nullcontext()
        try:
            with alone, Attempt(self.denoiser.ran_out) as attempt:
                self.demand.prepare(entries)
            apart = attempt.ran_out
        except Exception:
            logger.warning("preparing %d jobs together failed; one after another", len(entries), exc_info=True)
            apart = True
        if not apart:
            return
        for entry in entries:
            entry.contexts = {}
        for entry in entries:
            with self._alone(entry, events):
                self.demand.prepare([entry])

    def _denoise(self, events: list[Event]) -> None:
        batch = [
            (trajectory, step)
            for entry in self.book
            if entry.admitted
            for trajectory in entry.running.values()
            if (step := trajectory.next_step(skip_empty=self.savings.skip_empty_steps)) is not None
        ]
        if not batch:
            return
        began = self.clock()
        try:
            decisions = self.denoiser.step(batch)
        except Exception as error:
            taking_part = {trajectory.job.id for trajectory, _ in batch}
            events += failed(taking_part, error)
            for job_id in taking_part:
                self.book.drop(job_id)
            return
        events += self._timed(batch, began)
        for decision in decisions:
            if decision.trajectory.job.id in self.book:  # not failed with an earlier trajectory
                self._report(decision, events)

    def _timed(self, batch: Sequence[tuple[Trajectory, Step]], began: float) -> Iterator[Event]:
        """What the step took, for each job in it that is timed: at its first step, and then at every so many."""
        spent, seconds = self.denoiser.spent, self.clock() - began
        reward = spent.reward_forward_seconds + spent.reward_backward_seconds
        first = {trajectory.job.id: (trajectory, step) for trajectory, step in reversed(batch)}
        for trajectory, step in first.values():
            job, done = trajectory.job, trajectory.taken - 1
            if job.timed and done % math.ceil(job.diffusion.steps / TIMED_STEPS) == 0:
                yield Timed(job.id, step.index, len(batch), began, seconds, spent.forward, spent.guidance, reward)

    def _report(self, decision: Decision, events: list[Event]) -> None:
        """Progress of one trajectory, where the job asks for it; a trajectory that cannot go on fails its job."""
        trajectory, step, job = decision.trajectory, decision.step, decision.trajectory.job
        if decision.failure:
            self.book.drop(job.id)
            message = "the model or the reward gave values that are not finite"
            param = "guidance.eta" if step.guided else None
            ran_out = decision.failure == "out_of_memory"
            events.append(out_of_memory(job.id) if ran_out else Failed(job.id, "not_finite", message, param))
            return
        length = trajectory.length
        if job.stream_tokens and len(decision.chosen):
            revealed = list(zip(decision.chosen.tolist(), decision.tokens.tolist(), strict=True))
            revealed = [(position, token) for position, token in revealed if position < length]
            events.append(Progress(job.id, trajectory.index, step.index, revealed))
        if job.stream_canvas:
            entropy: list[float | None] = [None] * len(trajectory.tokens)  # of what is masked still
            for position, value in zip(decision.positions.tolist(), decision.entropy.tolist(), strict=True):
                entropy[position] = value if trajectory.masked[position] else None
            seen = entropy[:length], trajectory.last_reward, trajectory.ancestor
            events.append(Canvas(job.id, trajectory.index, step.index, trajectory.shown, *seen))

    def _retire(self, entry: Entry, events: list[Event]) -> None:
        """Move finished trajectories out; when all K are there, score and answer."""
        job = entry.job
        if entry.asked is not None:
            return
        ended = [index for index, trajectory in entry.running.items() if entry.stopped or self._over(trajectory)]
        if entry.particles is not None and len(ended) < len(entry.running):
            return  # those that are over may be copied, and be copied over
        for index in ended:
            entry.finished[index] = trajectory = entry.running.pop(index)
            trajectory.contexts.clear()  # memory that the next one may need
            trajectory.prefix = None
        if entry.stopped:
            # The trajectories that never started have nothing to show; they count as empty canvases.
            for index in set(range(job.sampling.best_of)) - entry.finished.keys():
                entry.finished[index] = Trajectory.start(job, index, self.loaded.info)
        if len(entry.finished) < job.sampling.best_of:
            return
        texts = [final_text(entry.finished[index], self.loaded, entry.stopped) for index in range(job.sampling.best_of)]
        rewards = self.judge.judge(entry, -1, [text.text for text in texts], events)
        if rewards is not None:
            self.book.drop(job.id)
            events.append(Finished(job.id, answer(entry, texts, rewards, self.clock())))

    def _over(self, trajectory: Trajectory) -> bool:
        """Whether nothing more is to be done for it."""
        leaves = self.savings.leave_when_final and trajectory.job.guidance.resample is None
        return (leaves and trajectory.final) or trajectory.next_step(skip_empty=self.savings.skip_empty_steps) is None

    # -- what one job needs --------------------------------------------------------------------------------------

    @contextmanager
    def _alone(self, entry: Entry, events: list[Event]) -> Iterator[None]:
        """An exception inside ends this job, and touches no other."""
        try:
            yield
        except Exception as error:
            self.book.drop(entry.job.id)
            events += failed([entry.job.id], error)
            if is_out_of_memory(error):
                self.denoiser.ran_out()

"""The engine's inner half: jobs in, one denoising step at a time, events out. Lives in the worker process.

`Runner.step` is the whole system in one function: admit, denoise, retire. `Denoiser` (worker/step) does the
tensor work of a step; the scheduler decides who takes part.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from server.budget import Budget, Cost
from server.diffusion.schedule import Step
from server.errors import InvalidRequest
from server.guidance.best_of import choose
from server.guidance.prefixes import RewardContext
from server.models.loading import LoadedDiffusionModel
from server.rewards.reward_model import RewardModel
from server.text.response import FinishedText, finish_text
from server.text.template import conversation_ids, split_at_response
from server.types import Job, JobResult, TrajectoryResult
from server.wire.messages import Canvas, Event, Failed, Finished, Progress, Started
from server.wire.stats import RunnerStats
from server.worker.memory import reward_tokens
from server.worker.out_of_memory import OUT_OF_MEMORY, attempt
from server.worker.pack import Trajectory
from server.worker.savings import Savings
from server.worker.scheduler import Scheduler, Ticket
from server.worker.step import Denoiser, Revealed

DEADLINE = "deadline"

R = TypeVar("R")


@dataclass(slots=True)
class _Running:
    """A job with at least one admitted trajectory."""

    job: Job
    queued_at: float
    started_at: float
    contexts: dict[str, RewardContext]
    trajectories: dict[int, Trajectory] = field(default_factory=dict)  # admitted and still denoising
    finished: dict[int, Trajectory] = field(default_factory=dict)
    stopped: str | None = None  # why it ended early: DEADLINE


class Runner:
    """Owns the queue and the running trajectories of one device."""

    def __init__(
        self,
        model: LoadedDiffusionModel,
        reward_models: Mapping[str, RewardModel],
        *,
        budget: Budget | None = None,
        largest: Budget | None = None,
        savings: Savings | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.loaded = model
        self.reward_models = dict(reward_models)
        self.scheduler = Scheduler(budget or Budget(), largest)
        self.savings = savings or Savings()
        self.denoiser = Denoiser(model.model, model.info, self.savings, budget)
        self.clock = clock
        self._queued: dict[str, tuple[Job, float]] = {}
        self._running: dict[str, _Running] = {}
        self._tickets: dict[tuple[str, int], Ticket] = {}
        self._refused: list[Event] = []
        self.begin: Callable[[str], None] = lambda _: None  # called with a job's id before anything is computed for it

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._queued or self._running or self._refused)

    @property
    def stats(self) -> RunnerStats:
        """Counters since start and gauges of this moment."""
        stats = self.denoiser.stats
        stats.running = self.scheduler.running_trajectories
        stats.waiting = self.scheduler.waiting_trajectories
        return stats

    def add(self, job: Job, now: float) -> None:
        """Queue a job. One that can never run is answered with a Failed event by the next step."""
        try:
            self.scheduler.add(job, self._checked_cost(job))
        except InvalidRequest as error:
            self._refused.append(Failed(job.id, "invalid_request", str(error), error.param))
            return
        self._queued[job.id] = (job, now)

    def cancel(self, job_id: str) -> bool:
        """Forget a job before the next denoising step; no event follows. Returns whether it was known."""
        known = job_id in self._queued or job_id in self._running
        self._forget(job_id)
        return known

    def abort_running(self) -> list[str]:
        """Drop every job that takes part in the current batch (its step failed); returns their ids."""
        ids = list(self._running)
        for job_id in ids:
            self._forget(job_id)
        return ids

    def step(self) -> list[Event]:
        """One pass: expire, admit, denoise every running trajectory by one step, retire. Returns what happened."""
        events: list[Event] = self._refused
        self._refused = []
        events += self._expire()
        for ticket in self.scheduler.admit():
            if ticket.job.id in self._queued:  # not lost by the start of an earlier trajectory
                events += self._start(ticket)
        batch = [
            (trajectory, step)
            for running in self._running.values()
            for trajectory in running.trajectories.values()
            if (step := self._next_step(trajectory)) is not None
        ]
        if batch:
            contexts = {job_id: running.contexts for job_id, running in self._running.items()}
            for revealed in self.denoiser.step(batch, contexts, self.reward_models):
                events += self._report(revealed)
        for running in list(self._running.values()):
            events += self._retire(running)
        return events

    # -- the stages of a step ------------------------------------------------------------------------------------

    def _expire(self) -> list[Event]:
        """Jobs past their deadline: queued ones fail, running ones end with what is there."""
        now = self.clock()
        events: list[Event] = []
        for job, _ in list(self._queued.values()):
            if job.deadline is not None and now >= job.deadline and job.id not in self._running:
                self._forget(job.id)
                events.append(Failed(job.id, "deadline", "the deadline passed while the request was queued", "timeout"))
        for running in self._running.values():
            if running.job.deadline is not None and now >= running.job.deadline:
                running.stopped = DEADLINE
        return events

    def _start(self, ticket: Ticket) -> list[Event]:
        job = ticket.job
        events: list[Event] = []
        if job.id not in self._running:
            self.begin(job.id)
            contexts = self._attempt(lambda: self._contexts(job))
            if contexts is None and (contexts := self._attempt(lambda: self._contexts(job))) is None:
                return self._lost(job.id)
            _, queued_at = self._queued[job.id]
            self._running[job.id] = _Running(job, queued_at, self.clock(), contexts)
            events.append(Started(job.id))
        trajectory = Trajectory.start(job, ticket.index, self.loaded.info.mask_token_id)
        self._running[job.id].trajectories[ticket.index] = trajectory
        self._tickets[job.id, ticket.index] = ticket
        return events

    def _report(self, revealed: Revealed) -> list[Event]:
        """Progress of one trajectory, for those who asked; a trajectory whose numbers went bad fails its job."""
        trajectory, step = revealed.trajectory, revealed.step
        job = trajectory.job
        if job.id not in self._running:
            return []
        if revealed.out_of_memory:
            return self._lost(job.id)
        if revealed.broken:
            self._forget(job.id)
            message = "the model or the reward gave values that are not finite"
            return [Failed(job.id, "not_finite", message, "guidance.eta" if step.guided else None)]
        events: list[Event] = []
        if job.stream_tokens and revealed.tokens:
            events.append(Progress(job.id, trajectory.index, step.index, revealed.tokens))
        if job.stream_canvas:
            shown = [
                -1 if masked else int(token) for token, masked in zip(trajectory.tokens, trajectory.masked, strict=True)
            ]
            events.append(Canvas(job.id, trajectory.index, step.index, shown, revealed.entropy, trajectory.last_reward))
        return events

    def _retire(self, running: _Running) -> list[Event]:
        """Move finished trajectories out; when all K are there, score and answer."""
        job = running.job
        if running.stopped:
            # The trajectories that never started have nothing to show; they count as empty canvases.
            for index in range(job.sampling.best_of):
                if index not in running.trajectories and index not in running.finished:
                    running.finished[index] = Trajectory.start(job, index, self.loaded.info.mask_token_id)
        for index, trajectory in list(running.trajectories.items()):
            if running.stopped or self._next_step(trajectory) is None:
                running.finished[index] = running.trajectories.pop(index)
                trajectory.reward_contexts.clear()  # memory that the next one may need
                ticket = self._tickets.pop((job.id, index))
                self.scheduler.release(ticket)
        if len(running.finished) < job.sampling.best_of:
            return []
        result = self._attempt(lambda: self._result(running)) or self._attempt(
            lambda: self._result(running, one_by_one=True)
        )
        if result is None:
            return self._lost(job.id)
        self._forget(job.id)
        return [Finished(job.id, result)]

    # -- answers -------------------------------------------------------------------------------------------------

    def _result(self, running: _Running, *, one_by_one: bool = False) -> JobResult:
        job = running.job
        trajectories = [running.finished[index] for index in range(job.sampling.best_of)]
        texts = [self._text(trajectory, running.stopped) for trajectory in trajectories]
        rewards = self._final_rewards(job, [text.text for text in texts], one_by_one)
        results = []
        for trajectory, text, reward in zip(trajectories, texts, rewards, strict=True):
            total = None
            if job.guidance.reward_models:
                total = math.fsum(weighted.weight * reward[weighted.model] for weighted in job.guidance.reward_models)
            results.append(
                TrajectoryResult(
                    index=trajectory.index,
                    token_ids=tuple(int(token) for token in trajectory.tokens),
                    text=text.text,
                    finish_reason=text.finish_reason,
                    completion_tokens=text.completion_tokens,
                    stop_reason=text.stop_reason,
                    reward=total,
                    rewards=reward,
                    trace=tuple(trajectory.trace),
                )
            )
        now = self.clock()
        model_calls = max(trajectory.model_calls for trajectory in trajectories)
        return JobResult(
            trajectories=tuple(results),
            chosen=choose([result.reward for result in results], job.sampling.n, ranked=job.guidance.method != "none"),
            steps=model_calls if job.diffusion.adaptive else job.diffusion.steps,
            model_calls=model_calls,
            reward_calls=max(trajectory.reward_calls for trajectory in trajectories),
            queue_ms=1e3 * (running.started_at - running.queued_at),
            generation_ms=1e3 * (now - running.started_at),
        )

    def _text(self, trajectory: Trajectory, stopped: str | None) -> FinishedText:
        """The text of a canvas; of one that a deadline cut, the part before its first masked position."""
        job = trajectory.job
        length = len(trajectory.tokens)
        known = int(trajectory.masked.argmax()) if trajectory.masked.any() else length
        text = finish_text(
            self.loaded.tokenizer,
            [int(token) for token in trajectory.tokens[:known]],
            self.loaded.info.stop_token_ids,
            job.sampling.stop,
            job.sampling.ignore_eos,
        )
        if stopped and text.finish_reason == "length" and known < length:
            return FinishedText(text.text, "length", stopped, text.completion_tokens)
        return text

    def _final_rewards(self, job: Job, texts: list[str], one_by_one: bool) -> list[dict[str, float]]:
        """R on the text of every trajectory (end of section 2), by reward model; `one_by_one` takes less memory."""
        rewards: list[dict[str, float]] = [{} for _ in texts]
        for weighted in job.guidance.reward_models:
            model = self.reward_models[weighted.model]
            sequences = [
                conversation_ids(model.tokenizer, job.conversation, text + job.response_suffix) for text in texts
            ]
            packs = [[sequence] for sequence in sequences] if one_by_one else [sequences]
            scores = [score for pack in packs for score in model.score(pack).tolist()]
            for reward, score in zip(rewards, scores, strict=True):
                reward[weighted.model] = float(score)
        return rewards

    # -- bookkeeping ---------------------------------------------------------------------------------------------

    def _checked_cost(self, job: Job) -> Cost:
        """What a trajectory of the job takes. Refuses what could only fail later: a reward model that is not loaded, a
        conversation too long for it."""
        canvas = len(job.prompt_ids) + job.sampling.max_tokens + len(job.suffix_ids)
        if canvas > self.loaded.info.context_length:
            raise InvalidRequest(
                f"prompt, suffix and max_tokens take {canvas} tokens; the context is {self.loaded.info.context_length}",
                param="max_tokens",
            )
        passed = cached = 0
        for weighted in job.guidance.reward_models:
            model = self.reward_models.get(weighted.model)
            if model is None:
                names = ", ".join(sorted(self.reward_models)) or "none"
                raise InvalidRequest(
                    f"reward model {weighted.model[:200]!r} is not loaded; loaded: {names}",
                    param="guidance.reward_model",
                )
            before, after = split_at_response(model.tokenizer, job.conversation, job.response_suffix)
            tokens = len(before) + job.sampling.max_tokens + len(after)
            if tokens > model.info.context_length:
                raise InvalidRequest(
                    f"conversation and response take {tokens} tokens; the context of reward model "
                    f"{weighted.model!r} is {model.info.context_length}",
                    param="messages",
                )
            lead = 0 if self.savings.reward_prefix_cache else len(before)
            own = lead + job.sampling.max_tokens + len(after)
            passed = max(passed, reward_tokens(model, own, len(before) - lead))
            cached += len(before) - lead
        grows = self.savings.reward_prefix_cache and self.savings.grow_reward_prefix
        grown = job.sampling.max_tokens * len(job.guidance.reward_models) if grows else 0
        return Cost.of(job, reward_tokens=passed, cached_tokens=cached, grown_tokens=grown)

    def _contexts(self, job: Job) -> dict[str, RewardContext]:
        """Reward prefixes of a job, computed once for all its trajectories and steps. Only the gradient needs them."""
        if not job.guidance.uses_gradient or job.guidance.gradient_steps == 0:
            return {}
        contexts = {}
        for weighted in job.guidance.reward_models:
            model = self.reward_models[weighted.model]
            before, after = split_at_response(model.tokenizer, job.conversation, job.response_suffix)
            if self.savings.reward_prefix_cache:
                contexts[weighted.model] = RewardContext.of(model.prefill(before), after)
            else:
                contexts[weighted.model] = RewardContext.of(model.prefill(()), after, before)
        return contexts

    def _next_step(self, trajectory: Trajectory) -> Step | None:
        return trajectory.next_step(skip_empty=self.savings.skip_empty_steps)

    def _attempt(self, work: Callable[[], R]) -> R | None:
        """What it returns, or None where memory ran out."""
        result = attempt(work)
        if result is None:
            self.denoiser.stats.out_of_memory += 1
        return result

    def _lost(self, job_id: str) -> list[Event]:
        """A job for which memory ran out, and again in smaller pieces."""
        self._forget(job_id)
        return [Failed(job_id, "out_of_memory", OUT_OF_MEMORY)]

    def _forget(self, job_id: str) -> None:
        self.scheduler.drop(job_id)
        self._queued.pop(job_id, None)
        running = self._running.pop(job_id, None)
        if running is not None:
            for index in running.trajectories:
                self._tickets.pop((job_id, index), None)

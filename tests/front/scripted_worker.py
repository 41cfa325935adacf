"""A worker process whose runner follows a script instead of a model. Started by the tests as the real one is.

A job's `prompt_ids` are its script: what to do (a `Do` value) and how many milliseconds a step takes. Tokens are a
plain function of seed, trajectory and position, so that a second run must give the same ones. A job with scorers asks
for them in its second step and at its end, as one that resamples does.
"""

from __future__ import annotations

import ctypes
import enum
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from server.errors import AdapterGone, ConfigurationError, InvalidRequest
from server.types import EngineInfo, Job, JobResult, ModelInfo, TrajectoryResult
from server.wire.config import WorkerConfig
from server.wire.messages import AdaptersSet, Ask, Canvas, Event, Finished, Judged, Progress, Score, Scored, Started
from server.wire.stats import RunnerStats
from server.worker.failures import failed
from server.worker.loop import main


class Do(enum.IntEnum):
    """What a job makes the runner do in its second step."""

    FINISH = 0
    RAISE = 1
    EXHAUST_MEMORY = 2
    DIE = 3
    HANG = 4
    HANG_WITH_THE_LOCK = 5
    ANSWER_TOO_MUCH = 6
    REFUSE = 7
    VARY = 8
    LOSE_THE_DEVICE = 9


def token(seed: int, position: int) -> int:
    """The token that a trajectory reveals at a position."""
    return (seed * 31 + position * 7) % 997


def result(job: Job, judged: Judged | None) -> JobResult:
    """The answer of a job, with what its scorers said at the end."""
    scores = {} if judged is None else judged.scores or {scorer.model: [None] for scorer in job.guidance.scorers}
    tokens = tuple(token(job.sampling.seed, position) for position in range(job.sampling.max_tokens))
    text = "x" * (65 * 2**20) if job.prompt_ids[0] == Do.ANSWER_TOO_MUCH else " ".join(map(str, tokens))
    trajectory = TrajectoryResult(0, tokens, text, "length", len(tokens), model_calls=len(tokens))
    trajectory = replace(trajectory, rewards={name: values[0] for name, values in scores.items()})
    return JobResult((trajectory,), (0,), len(tokens), 0.0, 0.0)


@dataclass
class ScriptedRunner:
    """All jobs run at once; each step reveals one position of each."""

    stats: RunnerStats = field(default_factory=RunnerStats)
    jobs: dict[str, Job] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    parked: dict[str, int] = field(default_factory=dict)
    heard: dict[str, Judged] = field(default_factory=dict)
    begin: Callable[[str], None] = lambda _: None
    device_lost: bool = False
    adapters: set[str] = field(default_factory=set)

    @property
    def has_work(self) -> bool:
        return bool(self.jobs.keys() - self.parked.keys())

    def judged(self, message: Judged) -> None:
        if self.parked.get(message.job_id) == message.step:
            del self.parked[message.job_id]
            self.heard[message.job_id] = message

    def add(self, job: Job, now: float) -> None:
        if job.prompt_ids[0] == Do.REFUSE:
            raise InvalidRequest("not this one", "prompt")
        if job.adapter is not None and job.adapter not in self.adapters:
            raise AdapterGone("no such adapter")
        self.jobs[job.id] = job
        self.steps[job.id] = 0

    def cancel(self, job_id: str) -> bool:
        for book in (self.steps, self.parked, self.heard):
            book.pop(job_id, None)
        self.stats.running = len(self.jobs) - (job_id in self.jobs)
        return self.jobs.pop(job_id, None) is not None

    def step(self) -> list[Event]:
        events: list[Event] = []
        time.sleep(max(job.prompt_ids[1] for job in self.jobs.values()) / 1000)
        self.stats.running = len(self.jobs)
        self.stats.batch_trajectories.add(len(self.jobs))
        try:
            for job in list(self.jobs.values()):
                events += () if job.id in self.parked else self.advance(job)
        except Exception as error:
            events += failed(self.jobs, error)
            for job_id in list(self.jobs):
                self.cancel(job_id)
        return events

    def advance(self, job: Job) -> list[Event]:
        do, step = Do(job.prompt_ids[0]), self.steps[job.id]
        if step == job.sampling.max_tokens:  # it has been judged
            return self.finish(job)
        if step == 0:
            self.begin(job.id)
        if step == 1:
            self.device_lost |= do == Do.LOSE_THE_DEVICE
            misbehave(do)
        events: list[Event] = [Started(job.id)] if step == 0 else []
        shown = os.getpid() if do == Do.VARY else token(job.sampling.seed, step)
        if job.stream_tokens:
            events.append(Progress(job.id, 0, step, [(step, shown)]))
        if job.stream_canvas:
            canvas = [token(job.sampling.seed, position) for position in range(step + 1)]
            events.append(Canvas(job.id, 0, step, canvas))
        self.stats.denoising_steps += 1
        self.stats.model_forward_seconds.add(0.01)
        self.steps[job.id] += 1
        last = self.steps[job.id] == job.sampling.max_tokens
        if job.guidance.scorers and (step == 1 or last):
            self.parked[job.id] = -1 if last else 2
            events.append(Ask(job.id, self.parked[job.id], [f"{job.sampling.seed} after {step}"]))
        elif last:
            events += self.finish(job)
        return events

    def finish(self, job: Job) -> list[Event]:
        done = Finished(job.id, result(job, self.heard.get(job.id)))
        self.cancel(job.id)
        return [done]


def misbehave(what: Do) -> None:
    match what:
        case Do.RAISE | Do.LOSE_THE_DEVICE:
            raise ValueError("secret of the model")
        case Do.EXHAUST_MEMORY:
            raise MemoryError
        case Do.DIE:
            os._exit(3)
        case Do.HANG:
            time.sleep(3600)
        case Do.HANG_WITH_THE_LOCK:
            ctypes.PyDLL(None).sleep(3600)


@dataclass
class ScriptedScorer:
    """The score of a response is its length."""

    requests: list[Score] = field(default_factory=list)

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    def add(self, request: Score) -> None:
        if request.reward_model != "length":
            raise InvalidRequest("no such reward model", "model")
        self.requests.append(request)

    def cancel(self, request_id: str) -> bool:
        before = len(self.requests)
        self.requests = [request for request in self.requests if request.id != request_id]
        return len(self.requests) < before

    def step(self) -> list[Event]:
        request = self.requests.pop(0)
        scores = [float(len(response)) for _, response in request.items]
        return [Scored(request.id, scores, sum(len(response) for _, response in request.items))]


@dataclass
class ScriptedService:
    info: EngineInfo
    runner: ScriptedRunner
    scorer: ScriptedScorer

    def check_device(self) -> None:
        if self.runner.device_lost:
            raise RuntimeError("an illegal memory access was encountered")

    def set_adapters(self, folders: dict[str, str]) -> AdaptersSet:
        """A new one's configuration says what comes of it: `refuse`, `die`, or anything else."""
        refused = {}
        for version in folders.keys() - self.runner.adapters:
            said = Path(folders[version], "adapter_config.json").read_text()
            if said == "die":
                os._exit(3)
            if said == "refuse":
                refused[version] = "adapter_config.json: not this one"
        self.runner.adapters = folders.keys() - refused.keys()
        return AdaptersSet(sorted(self.runner.adapters), refused)


def load(config: WorkerConfig) -> ScriptedService:
    """`model` is a script too: how the loading ends, if a file of the name after the colon exists or there is no colon;
    `missing-from:N` has no device for worker N and those after it."""
    how, colon, condition = config.model.partition(":")
    if how == "missing-from" and config.rank >= int(condition):
        raise ConfigurationError(f"device: there is none for worker {config.rank}")
    if not colon or os.path.exists(condition):
        match how:
            case "missing":
                raise ConfigurationError("model: no checkpoint of that name")
            case "broken":
                raise RuntimeError("a bug in the loader")
            case "die":
                os._exit(7)
            case "hang":
                time.sleep(3600)
    model = ModelInfo("scripted", "none", "", 4096, 1000, 1, 2, 2, (2,), 8, "float32", 0)
    return ScriptedService(EngineInfo(model, (), "cpu", "none"), ScriptedRunner(), ScriptedScorer())


if __name__ == "__main__":
    sys.exit(main(lambda: load))

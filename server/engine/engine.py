"""The engine's face in the HTTP process: jobs in, events out, on one asyncio loop.

It knows which jobs are in flight, how many may be, and what their readers have been given. The work is done
in a worker process that a `Supervisor` keeps alive; when one dies, its unfinished jobs run once more on the
next.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from server.engine.admission import Throughput
from server.engine.config import EngineConfig
from server.engine.messages import (
    Cancel,
    Event,
    Failed,
    Finished,
    FrameTooLarge,
    Heartbeat,
    Score,
    Scored,
    Submit,
    frame,
    subject,
)
from server.engine.pending import Answer, Pending
from server.engine.stats import RunnerStats
from server.engine.supervisor import Supervisor
from server.errors import Draining, InvalidRequest, NotReady, QueueFull, from_kind
from server.types import EngineInfo, Job, Message

logger = logging.getLogger(__name__)

MAX_DEATHS = 2  # of ready workers, with a job in their hands
MAX_FAILED_STARTS = 2  # in a row; after that work is refused until one succeeds
DEADLINE_SECONDS = 1.0  # between two looks at a job whose deadline has passed
SHUT_DOWN = "the server is shutting down"


@dataclass(frozen=True, slots=True)
class EngineStats:
    """For the metrics. `runner` sums over all workers so far; its gauges are the present worker's."""

    runner: RunnerStats
    jobs_in_flight: int
    worker_restarts: int
    ready: bool


class JobStream:
    """The events of one job, ending with Finished or Failed. Closing it early, or dropping it, cancels the
    job."""

    _ended = True  # until there is something to cancel

    def __init__(self, engine: Engine, pending: Pending) -> None:
        self._engine = engine
        self._pending = pending
        self._loop = asyncio.get_running_loop()
        self._ended = False

    def __aiter__(self) -> JobStream:
        return self

    async def __anext__(self) -> Event:
        """The next event. A cancelled wait loses nothing: ask again, or close."""
        if self._ended:
            raise StopAsyncIteration
        event = await self._pending.mailbox.get()
        self._ended = isinstance(event, Answer)
        return event

    async def aclose(self) -> None:
        """The client is gone: the job leaves before the worker's next denoising step."""
        self._ended = True
        self._engine.cancel(self._pending.id)

    async def __aenter__(self) -> JobStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if not self._ended:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and the worker with it
                self._loop.call_soon_threadsafe(self._engine.cancel, self._pending.id)


class Engine:
    """One model, one worker, a bounded number of jobs. All methods belong to the event loop's thread."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self._supervisor = Supervisor(config, self)
        self._info: EngineInfo | None = None
        self._pending: dict[str, Pending] = {}
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._throughput = Throughput()
        self._past = RunnerStats()  # of workers that are no more
        self._present = RunnerStats()
        self._score_ids = itertools.count()

    # -- life ------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load and warm up; returns when ready. Raises ConfigurationError when a setting or a checkpoint is
        wrong, EngineFailed when the worker dies for another reason."""
        await self._supervisor.start()

    async def drain(self, grace_seconds: float) -> bool:
        """Take no new work and wait for the work in flight; what is left after the grace time fails. Returns
        whether everything was finished."""
        self._draining = True
        if not self._pending:
            return True
        try:
            await asyncio.wait_for(self._idle.wait(), grace_seconds)
        except TimeoutError:
            logger.warning("%d jobs did not finish within %g seconds", len(self._pending), grace_seconds)
            self._fail_all("draining", SHUT_DOWN)
            return False
        return True

    async def stop(self) -> None:
        """End the worker; whatever is in flight fails."""
        self._draining = True
        self._fail_all("draining", SHUT_DOWN)
        await self._supervisor.stop()

    @property
    def ready(self) -> bool:
        """Whether a worker is there to take work, and we take it."""
        return self._supervisor.ready and not self._draining

    @property
    def draining(self) -> bool:
        """Whether new work is refused because the server is shutting down."""
        return self._draining

    @property
    def info(self) -> EngineInfo:
        """The loaded models. Raises NotReady before the first worker is ready."""
        if self._info is None:
            raise NotReady("the models are being loaded")
        return self._info

    @property
    def worker_pid(self) -> int | None:
        """The process id of the present worker."""
        return self._supervisor.worker_pid

    @property
    def stats(self) -> EngineStats:
        """Numbers for the metrics, at most a heartbeat old."""
        return EngineStats(
            runner=self._past.plus(self._present),
            jobs_in_flight=len(self._pending),
            worker_restarts=self._supervisor.restarts,
            ready=self.ready,
        )

    # -- work ------------------------------------------------------------------------------------------------

    def check_room(self, jobs: int = 1) -> None:
        """Raises Draining, NotReady or QueueFull when so many more jobs cannot be taken now. Nothing can come
        between this and as many calls of `submit` that follow without an await."""
        if self._draining:
            raise Draining(SHUT_DOWN, retry_after=5.0)
        if self._info is None or self._supervisor.failed_starts >= MAX_FAILED_STARTS:
            raise NotReady(
                "no worker is ready to take requests", retry_after=max(1.0, self._supervisor.backoff_seconds)
            )
        if len(self._pending) + jobs > self.config.max_jobs:
            raise QueueFull(
                f"{len(self._pending)} requests are in flight; the server takes {self.config.max_jobs}",
                retry_after=self._throughput.retry_after_seconds(len(self._pending), time.monotonic()),
            )

    def submit(self, job: Job) -> JobStream:
        """Queue a job; its events come from the stream. While a worker is being restarted, jobs wait for it.
        Raises as `check_room` does, and InvalidRequest for a job that no frame can hold."""
        return JobStream(self, self._enqueue(job.id, Submit(job), job.deadline))

    def cancel(self, job_id: str) -> None:
        """Drop a job or score request; who still reads its events gets a Failed. Unknown ids are ignored."""
        if job_id in self._pending:
            self._supervisor.send(frame(Cancel(job_id)))
            self._answer(Failed(job_id, "cancelled", "the request was cancelled"))

    async def score(
        self,
        reward_model: str,
        items: Sequence[tuple[tuple[Message, ...], str]],
        *,
        deadline: float | None = None,
    ) -> list[float]:
        """Rewards of (conversation, response) pairs, in order. Raises as `check_room` does, InvalidRequest,
        and DeadlineExceeded past `deadline` (seconds of time.time())."""
        request_id = f"score:{next(self._score_ids)}"
        message = Score(request_id, reward_model, list(items))
        async with JobStream(self, self._enqueue(request_id, message, deadline)) as stream:
            async for event in stream:
                match event:
                    case Scored(scores=scores):
                        return scores
                    case Failed(kind=kind, message=text, param=param):
                        raise from_kind(kind, text, param)
                    case _:
                        continue
        raise from_kind("engine_failed", "the score request got no answer")

    def _enqueue(self, identity: str, message: Submit | Score, deadline: float | None) -> Pending:
        self.check_room()
        if identity in self._pending:
            raise ValueError(f"job {identity!r} is in flight already")
        try:
            data = frame(message)
        except (FrameTooLarge, TypeError) as error:
            raise InvalidRequest(f"the request cannot be handed to the worker: {error}") from error
        pending = Pending(identity, data, isinstance(message, Submit), deadline)
        self._pending[identity] = pending
        self._idle.clear()
        self._arm(pending)
        self._supervisor.send(data)
        return pending

    # -- what the supervisor reports -------------------------------------------------------------------------

    def on_ready(self, info: EngineInfo) -> None:
        """A worker can take work: hand it everything that has no answer."""
        self._info = info
        for pending in self._pending.values():
            self._supervisor.send(pending.frame)

    def on_event(self, event: Event) -> None:
        """Pass an event to whom it concerns."""
        if isinstance(event, Heartbeat):
            self._present = event.stats
            return
        pending = self._pending.get(subject(event) or "")
        if pending is None:
            return  # cancelled meanwhile
        if isinstance(event, Answer):
            if isinstance(event, Finished):
                self._throughput.finished(time.monotonic())
            self._answer(event)
        elif not pending.deliver(event):
            logger.error("job %s: the second run differs from the first", pending.id)
            self._supervisor.send(frame(Cancel(pending.id)))
            self._answer(Failed(pending.id, "engine_failed", "the worker was lost and the text could not be continued"))

    def on_death(self) -> None:
        """A worker is gone. Its jobs wait for the next one, unless it is their second loss."""
        self._past = self._past.plus(replace(self._present, running=0, waiting=0))
        self._present = RunnerStats()
        for pending in list(self._pending.values()):
            pending.deaths += 1
            if pending.deaths >= MAX_DEATHS:
                self._answer(Failed(pending.id, "unavailable", "the worker was lost twice during this request"))
            else:
                self._arm(pending)

    def on_failed_start(self) -> None:
        """No worker in the dead one's place yet. One failed start may be chance; after that nobody waits any
        longer."""
        if self._supervisor.failed_starts >= MAX_FAILED_STARTS:
            for identity in list(self._pending):
                self._answer(Failed(identity, "unavailable", "the worker was lost and could not be restarted"))

    # -- bookkeeping -----------------------------------------------------------------------------------------

    def _answer(self, answer: Answer) -> None:
        pending = self._pending.pop(subject(answer) or "")
        pending.close(answer)
        if not self._pending:
            self._idle.set()

    def _fail_all(self, kind: str, message: str) -> None:
        for identity in list(self._pending):
            self._supervisor.send(frame(Cancel(identity)))
            self._answer(Failed(identity, kind, message))

    def _arm(self, pending: Pending) -> None:
        """Start the clock on a deadline."""
        pending.cancel_timer()
        if pending.deadline is not None:
            delay = max(0.0, pending.deadline - time.time())
            pending.timer = asyncio.get_running_loop().call_later(delay, self._expire, pending)

    def _expire(self, pending: Pending) -> None:
        """The deadline has passed. A worker that has the job ends it at its next step, a running one with
        what is there; only while there is no worker, and for scores, the word is ours."""
        if pending.is_job and self._supervisor.ready:
            pending.timer = asyncio.get_running_loop().call_later(DEADLINE_SECONDS, self._expire, pending)
            return
        self._supervisor.send(frame(Cancel(pending.id)))
        message = "the deadline passed while the request was queued"
        self._answer(Failed(pending.id, "deadline", message, "timeout"))

"""The engine's face in the HTTP process: jobs in, events out, on one asyncio loop.

It knows which jobs are in flight, how many may be, and what their readers have been given. The work is done in worker
processes, one a device, that `Supervisor`s keep alive; `Dispatcher` says which of them gets what. When one dies, its
unfinished jobs run once more, on whichever worker is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from server.errors import Draining, InvalidRequest, NotReady, QueueFull, from_kind
from server.front.admission import Throughput
from server.front.dispatch import Dispatcher, job_cost, score_cost
from server.front.pending import Answer, Pending
from server.front.replica import Replica
from server.front.supervisor import Spare
from server.types import EngineInfo, Job, Message
from server.wire.config import EngineConfig
from server.wire.messages import (
    Begun,
    Cancel,
    Event,
    Failed,
    FrameTooLarge,
    Score,
    Scored,
    Submit,
    frame,
    subject,
)
from server.wire.stats import RunnerStats

logger = logging.getLogger(__name__)

MAX_FAILED_STARTS = 2  # in a row; after that nobody waits for this worker until one succeeds
DEADLINE_SECONDS = 1.0  # between two looks at a job whose deadline has passed
SHUT_DOWN = "the server is shutting down"


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """One worker: whether it can take work, what it computes on (empty before it was ever ready), and how often it was
    restarted."""

    ready: bool
    device: str
    kernel_backend: str
    restarts: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    """For the metrics. `runner` sums over all workers so far; its gauges are the present workers'. `workers` are in
    the order of their numbers."""

    runner: RunnerStats
    jobs_in_flight: int
    ready: bool
    workers: tuple[WorkerStats, ...] = ()

    @property
    def worker_restarts(self) -> int:
        """Of all workers together."""
        return sum(worker.restarts for worker in self.workers)


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

    @property
    def begun_at(self) -> float | None:
        """When a worker began to compute for the job (`time.monotonic`); None before that."""
        return self._pending.begun_at

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
    """One model, a worker a device, a bounded number of jobs. All methods belong to the event loop's thread."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self._spare = Spare(config.worker_command) if config.spare_worker else None
        self._replicas = [Replica(rank, config, self, self._spare) for rank in range(config.worker.data_parallel)]
        self._dispatcher = Dispatcher(len(self._replicas))
        self._info: EngineInfo | None = None
        self._pending: dict[str, Pending] = {}
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._throughput = Throughput()
        self._score_ids = itertools.count()

    # -- life ------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load and warm up; returns when all workers are ready (work is taken as soon as one is). Raises
        ConfigurationError when a setting or a checkpoint is wrong, EngineFailed when a worker dies for another
        reason."""
        first, *others = (replica.supervisor for replica in self._replicas)
        # The first one goes alone: it downloads what is missing and compiles kernels, and the others find both.
        await first.start()
        starts = [asyncio.create_task(other.start(), name=f"start {other.name}") for other in others]
        try:
            await asyncio.gather(*starts)
        finally:
            for start in starts:
                start.cancel()
            await asyncio.gather(*starts, return_exceptions=True)

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
        """End the workers; whatever is in flight fails."""
        self._draining = True
        self._fail_all("draining", SHUT_DOWN)
        await asyncio.gather(*(replica.supervisor.stop() for replica in self._replicas))
        if self._spare is not None:
            await self._spare.stop()

    @property
    def ready(self) -> bool:
        """Whether a worker is there to take work, and we take it."""
        return not self._draining and any(replica.ready for replica in self._replicas)

    @property
    def draining(self) -> bool:
        """Whether new work is refused because the server is shutting down."""
        return self._draining

    @property
    def info(self) -> EngineInfo:
        """The loaded models; `device` is the first worker's. Raises NotReady before any worker is ready."""
        if self._info is None:
            raise NotReady("the models are being loaded")
        return self._info

    @property
    def worker_pids(self) -> tuple[int | None, ...]:
        """The process ids of the present workers, in the order of their numbers."""
        return tuple(replica.supervisor.worker_pid for replica in self._replicas)

    @property
    def stats(self) -> EngineStats:
        """Numbers for the metrics, at most a heartbeat old."""
        runner = RunnerStats()
        for replica in self._replicas:
            runner = runner.plus(replica.stats)
        return EngineStats(
            runner=runner,
            jobs_in_flight=len(self._pending),
            ready=self.ready,
            workers=tuple(
                WorkerStats(
                    ready=replica.ready,
                    device="" if replica.info is None else replica.info.device,
                    kernel_backend="" if replica.info is None else replica.info.kernel_backend,
                    restarts=replica.supervisor.restarts,
                )
                for replica in self._replicas
            ),
        )

    # -- work ------------------------------------------------------------------------------------------------

    def check_room(self, jobs: int = 1) -> None:
        """Raises Draining, NotReady or QueueFull when so many more jobs cannot be taken now. Nothing can come
        between this and as many calls of `submit` that follow without an await."""
        if self._draining:
            raise Draining(SHUT_DOWN, retry_after=5.0)
        if self._info is None or self._nobody_will_come():
            wait = min(replica.supervisor.backoff_seconds for replica in self._replicas)
            raise NotReady("no worker is ready to take requests", retry_after=max(1.0, wait))
        if len(self._pending) + jobs > self.config.max_queue:
            raise QueueFull(
                f"{len(self._pending)} requests are in flight; the server takes {self.config.max_queue}",
                retry_after=self._throughput.retry_after_seconds(len(self._pending), time.monotonic(), jobs),
            )

    def submit(self, job: Job) -> JobStream:
        """Queue a job; its events come from the stream. While a worker is being restarted, jobs wait for it.
        Raises as `check_room` does, and InvalidRequest for a job that no frame can hold."""
        return JobStream(self, self._enqueue(job.id, Submit(job), job_cost(job), job.deadline))

    def cancel(self, job_id: str) -> None:
        """Drop a job or score request; who still reads its events gets a Failed. Unknown ids are ignored."""
        if job_id in self._pending:
            self._drop(self._pending[job_id], Failed(job_id, "cancelled", "the request was cancelled"))

    async def score(
        self,
        reward_model: str,
        items: Sequence[tuple[tuple[Message, ...], str]],
        *,
        deadline: float | None = None,
    ) -> list[float]:
        """Rewards of (conversation, response) pairs, in order. Raises as `scored` does."""
        return (await self.scored(reward_model, items, deadline=deadline)).scores

    async def scored(
        self,
        reward_model: str,
        items: Sequence[tuple[tuple[Message, ...], str]],
        *,
        deadline: float | None = None,
    ) -> Scored:
        """Rewards of (conversation, response) pairs, in order, and the tokens read for them. Raises as `check_room`
        does, InvalidRequest, and DeadlineExceeded past `deadline` (seconds of time.time())."""
        request_id = f"score:{next(self._score_ids)}"
        message = Score(request_id, reward_model, list(items))
        async with JobStream(self, self._enqueue(request_id, message, score_cost(message), deadline)) as stream:
            async for event in stream:
                match event:
                    case Scored():
                        return event
                    case Failed(kind=kind, message=text, param=param):
                        raise from_kind(kind, text, param)
                    case _:
                        continue
        raise from_kind("engine_failed", "the score request got no answer")

    def _enqueue(self, identity: str, message: Submit | Score, cost: float, deadline: float | None) -> Pending:
        self.check_room()
        if identity in self._pending:
            raise ValueError(f"job {identity!r} is in flight already")
        try:
            data = frame(message)
        except (FrameTooLarge, TypeError) as error:
            raise InvalidRequest(f"the request cannot be handed to the worker: {error}") from error
        pending = Pending(identity, data, isinstance(message, Submit), deadline, cost)
        self._pending[identity] = pending
        self._throughput.taken(len(self._pending), self.config.max_queue, time.monotonic())
        self._idle.clear()
        self._arm(pending)
        self._dispatcher.add(pending)
        self._dispatch()
        return pending

    def _dispatch(self) -> None:
        """Hand waiting work to the workers that can take it."""
        ready = [replica.rank for replica in self._replicas if replica.ready]
        expected = any(not replica.ready and not _given_up(replica) for replica in self._replicas)
        for rank, pending in self._dispatcher.assign(ready, more_to_come=expected):
            if pending.deaths:
                logger.info("request %s runs alone on worker %d", pending.id, rank)
            self._replicas[rank].supervisor.send(pending.frame)

    # -- what the replicas report ----------------------------------------------------------------------------

    def on_ready(self, replica: Replica) -> None:
        """A worker can take work."""
        if self._info is None or replica.rank == 0:
            self._info = replica.info
        self._dispatch()

    def on_event(self, replica: Replica, event: Event) -> None:
        """Pass an event to whom it concerns."""
        pending = self._pending.get(subject(event) or "")
        if pending is None or pending.worker != replica.rank:
            return  # cancelled meanwhile
        if isinstance(event, Begun):
            pending.begun = True
            if pending.begun_at is None:
                pending.begun_at = time.monotonic()
        elif isinstance(event, Answer):
            self._answer(event)
        elif not pending.deliver(event):
            logger.error("job %s: the second run differs from the first", pending.id)
            text = "the worker was lost and the text could not be continued"
            self._drop(pending, Failed(pending.id, "engine_failed", text))

    def on_death(self, replica: Replica) -> None:
        """A worker is gone. Its jobs run again, unless it is the second that one of them was part of."""
        lost = self._dispatcher.jobs_of(replica.rank)
        convicted = self._dispatcher.lost(replica.rank)
        if lost:
            logger.warning(
                "%s had %d requests; after its death %d wait to run alone",
                replica.supervisor.name,
                len(lost),
                self._dispatcher.suspects,
                extra={"suspects": self._dispatcher.suspects, "convicted": [pending.id for pending in convicted]},
            )
        for pending in convicted:
            self._answer(Failed(pending.id, "unavailable", "the worker was lost twice during this request"))
        for pending in lost:
            if pending.id in self._pending:
                self._arm(pending)
        self._dispatch()

    def on_failed_start(self, replica: Replica) -> None:
        """No worker in the dead one's place yet. One failed start may be chance; after that nobody waits for it."""
        if self._nobody_will_come():
            for identity in list(self._pending):
                self._answer(Failed(identity, "unavailable", "the worker was lost and could not be restarted"))
        else:
            self._dispatch()

    def _nobody_will_come(self) -> bool:
        return all(_given_up(replica) for replica in self._replicas)

    # -- bookkeeping -----------------------------------------------------------------------------------------

    def _answer(self, answer: Answer) -> None:
        pending = self._pending.pop(subject(answer) or "")
        now = time.monotonic()
        self._throughput.finished(now)
        self._throughput.taken(len(self._pending), self.config.max_queue, now)
        if pending.deaths and pending.worker is not None:
            logger.info("request %s has run alone", pending.id)
        self._dispatcher.remove(pending)
        pending.close(answer)
        if not self._pending:
            self._idle.set()
        self._dispatch()  # the worker may have been kept free for the next suspect

    def _drop(self, pending: Pending, answer: Failed) -> None:
        """Answer instead of the worker, and tell it, if it has the job."""
        if pending.worker is not None:
            self._replicas[pending.worker].supervisor.send(frame(Cancel(pending.id)))
        self._answer(answer)

    def _fail_all(self, kind: str, message: str) -> None:
        for pending in list(self._pending.values()):
            self._drop(pending, Failed(pending.id, kind, message))

    def _arm(self, pending: Pending) -> None:
        """Start the clock on a deadline."""
        pending.cancel_timer()
        if pending.deadline is not None:
            delay = max(0.0, pending.deadline - time.time())
            pending.timer = asyncio.get_running_loop().call_later(delay, self._expire, pending)

    def _expire(self, pending: Pending) -> None:
        """The deadline has passed. A worker that has the job ends it at its next step, a running one with
        what is there; only while no worker has it, and for scores, the word is ours."""
        if pending.is_job and pending.worker is not None:
            pending.timer = asyncio.get_running_loop().call_later(DEADLINE_SECONDS, self._expire, pending)
            return
        message = "the deadline passed while the request was queued"
        self._drop(pending, Failed(pending.id, "deadline", message, "timeout"))


def _given_up(replica: Replica) -> bool:
    return not replica.ready and replica.supervisor.failed_starts >= MAX_FAILED_STARTS

"""The engine's face in the HTTP process: requests in, events out, on one asyncio loop.

It knows which requests are in flight, how many may be, and what their readers have been given. The work is done in
worker processes, one a device, that a `Replica` each keeps alive; `Dispatcher` says which of them gets what. When one
dies, its unfinished requests run again, on whichever worker is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Coroutine, Sequence
from functools import reduce
from typing import Any

from server import errors
from server.front.adapters import Adapters
from server.front.admission import Throughput
from server.front.dispatch import Dispatcher, cost_of, steps_of
from server.front.judging import Judging
from server.front.pending import Answer, Pending
from server.front.process import Spare
from server.front.replica import Replica
from server.log import request_id
from server.scorers.calls import Metadata
from server.scorers.scorer import Scorer
from server.types import EngineInfo, Job, Message
from server.wire.config import EngineConfig
from server.wire.messages import (
    AdaptersSet,
    Ask,
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

DEADLINE_SECONDS = 1.0  # between two looks at a job whose deadline has passed
SHUT_DOWN = "the server is shutting down"


class JobStream:
    """The events of one request, ending with its answer. Closing it early, or dropping it, cancels the request."""

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
        event = await self._pending.next_event()
        self._ended = isinstance(event, Answer)
        return event

    @property
    def begun_at(self) -> float | None:
        """When a worker began to compute for it (`time.monotonic`); None before that."""
        return self._pending.begun_at

    async def aclose(self) -> None:
        """The client is gone: the job leaves before the worker's next denoising step."""
        self._ended = True
        self._engine.cancel(self._pending.id)

    def __del__(self) -> None:
        if not self._ended:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and the worker with it
                self._loop.call_soon_threadsafe(self._engine.cancel, self._pending.id)


class Engine:
    """One model, a worker a device, a bounded number of requests. All methods belong to the event loop's thread."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self._spare = Spare(config.worker_command) if config.spare_worker else None
        self.replicas = tuple(Replica(rank, config, self, self._spare) for rank in range(config.worker.data_parallel))
        self.adapters = Adapters(config.max_loras, self.replicas)
        self.scorers = {each.name: Scorer(each) for each in config.scorers}
        self._dispatcher = Dispatcher(len(self.replicas))
        self._pending: dict[str, Pending] = {}
        self._taken: Counter[int] = Counter()  # places, by the priority of what has them
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._throughput = Throughput(time.monotonic())
        self._score_ids = itertools.count()

    async def start(self) -> None:
        """Load and warm up; returns when all workers are ready (work is taken as soon as one is). Raises
        ConfigurationError when a setting or a checkpoint is wrong, EngineFailed when a worker dies for another
        reason."""
        await self.adapters.begin(self.config.loras)
        for scorer in self.scorers.values():
            await scorer.start()
        first, *others = self.replicas
        # The first one goes alone: it downloads what is missing and compiles kernels, and the others find both.
        await first.start()
        starts = [asyncio.create_task(other.start(), name=f"start {other.name}") for other in others]
        try:
            await asyncio.gather(*starts)
        finally:
            for start in starts:
                start.cancel()
            await asyncio.gather(*starts, return_exceptions=True)

    async def drain(self, grace_seconds: float) -> None:
        """Take no new work and wait for the work in flight; what is left after the grace time fails, and what is of a
        batch at once, since it is not lost."""
        self._draining = True
        self._fail_all(errors.Draining(SHUT_DOWN), least_priority=1)
        if self._pending:
            try:
                await asyncio.wait_for(self._idle.wait(), grace_seconds)
            except TimeoutError:
                logger.warning("%d requests did not finish within %g seconds", len(self._pending), grace_seconds)
                self._fail_all(errors.Draining(SHUT_DOWN))

    async def stop(self) -> None:
        """End the workers; whatever is in flight fails."""
        self._draining = True
        self._fail_all(errors.Draining(SHUT_DOWN))
        await asyncio.gather(*(replica.stop() for replica in self.replicas))
        if self._spare is not None:
            await self._spare.stop()
        for scorer in self.scorers.values():
            await scorer.close()
        self.adapters.close()

    @property
    def ready(self) -> bool:
        """Whether a worker is there to take work, and we take it."""
        return not self._draining and any(replica.ready for replica in self.replicas)

    @property
    def given_up(self) -> bool:
        """Whether no worker is there that anybody waits for: the last starts of all of them failed."""
        return all(replica.given_up for replica in self.replicas)

    @property
    def info(self) -> EngineInfo:
        """What the first worker that has been ready loaded. Raises NotReady before there is one."""
        for replica in self.replicas:
            if replica.info is not None:
                return replica.info
        raise errors.NotReady("the models are being loaded")

    @property
    def stats(self) -> RunnerStats:
        """Sums over all workers so far; gauges of the present ones."""
        return reduce(RunnerStats.plus, (replica.stats for replica in self.replicas))

    @property
    def parked(self) -> int:
        """How many jobs wait for outside scorers."""
        return sum(pending.parked is not None for pending in self._pending.values())

    def check_room(self, jobs: int = 1, priority: int = 0) -> None:
        """Raises Draining, NotReady or QueueFull when so many more jobs cannot be taken now. Nothing can come
        between this and as many calls of `submit` that follow without an await. Each priority has all places: what has
        none left takes none from another."""
        if self._draining:
            raise errors.Draining(SHUT_DOWN, retry_after=5.0)
        if self.given_up or not any(replica.info for replica in self.replicas):
            wait = min(replica.backoff_seconds for replica in self.replicas)
            raise errors.NotReady("no worker is ready to take requests", retry_after=max(1.0, wait))
        taken = self._taken[priority]
        if taken + jobs > self.config.max_queue:
            message = f"{taken} requests are in flight; the server takes {self.config.max_queue}"
            if priority:  # no place that others wait for is promised to a batch
                raise errors.QueueFull(message)
            now = time.monotonic()
            wait = self._throughput.retry_after_seconds(taken, now, jobs, self.ends_seconds)
            raise errors.QueueFull(message, retry_after=wait)

    def ends_seconds(self) -> list[float]:
        """In how many seconds each job that is computed, but for batches', will have done its steps, if they go on as
        they went."""
        now, ends = time.monotonic(), []
        for pending in self._pending.values():
            if pending.worker is None or pending.begun_at is None or not pending.steps or pending.priority:
                continue
            if pending.parked:
                continue  # how long scorers take is not known
            done = self.replicas[pending.worker].steps - pending.begun_step
            if done > 0:
                ends.append(max(0, pending.steps - done) * (now - pending.begun_at) / done)
        return ends

    def submit(self, job: Job, metadata: Metadata = None) -> JobStream:
        """Queue a job; its events come from the stream. While a worker is being restarted, jobs wait for it. Outside
        scorers see the `metadata`. Raises as `check_room` does, ScorerUnavailable, and InvalidRequest for a job that no
        frame can hold."""
        judging = Judging(job, metadata, self.scorers)
        judging.check()
        pending = self._enqueue(job, job.deadline, job.priority)
        pending.judging = judging
        self._dispatcher.add(pending)
        self.dispatch()
        return JobStream(self, pending)

    def cancel(self, identity: str) -> None:
        """Drop a request; its reader, if there is one, gets a Failed. Unknown ids are ignored."""
        if identity in self._pending:
            self._drop(self._pending[identity], errors.ClientGone("the request was cancelled"))

    async def score(
        self,
        reward_model: str,
        items: Sequence[tuple[tuple[Message, ...], str]],
        *,
        deadline: float | None = None,
        metadata: Metadata = None,
    ) -> Scored:
        """Rewards of (conversation, response) pairs, in order, and the tokens read for them, which of an outside scorer
        (that sees the `metadata`) are not known: 0. Raises as `check_room` does, InvalidRequest, ScorerFailed,
        ScorerUnavailable, and DeadlineExceeded past `deadline` (seconds of time.time())."""
        request = Score(f"score-{request_id.get()}-{next(self._score_ids)}", reward_model, list(items))
        pending = self._enqueue(request, deadline, priority=0)
        if (scorer := self.scorers.get(reward_model)) is not None:
            self._meanwhile(pending, self._ask_scorer(pending, scorer.score(items, metadata)))
        else:
            self._dispatcher.add(pending)
            self.dispatch()
        stream = JobStream(self, pending)
        try:
            answer = await anext(stream)
        finally:
            await stream.aclose()
        if isinstance(answer, Scored):
            return answer
        raise answer.error() if isinstance(answer, Failed) else errors.EngineFailed("the scores got no answer")

    def _enqueue(self, work: Job | Score, deadline: float | None, priority: int) -> Pending:
        """Take a place for some work."""
        self.check_room(priority=priority)
        if work.id in self._pending:
            raise ValueError(f"request {work.id!r} is in flight already")
        try:
            data = frame(Submit(work) if isinstance(work, Job) else work)
        except (FrameTooLarge, TypeError) as error:
            raise errors.InvalidRequest(f"the request cannot be handed to the worker: {error}") from error
        steps = steps_of(work) if isinstance(work, Job) else 0
        pending = Pending(work.id, data, isinstance(work, Job), cost_of(work), steps, priority, request_id.get())
        self._pending[work.id] = pending
        self._taken[priority] += 1
        self._throughput.taken(self._taken[0], self.config.max_queue, time.monotonic())
        self._idle.clear()
        if deadline is not None:
            self._look_after(max(0.0, deadline - time.time()), pending)
        return pending

    def _meanwhile(self, pending: Pending, work: Coroutine[Any, Any, None]) -> None:
        """Have outside scorers asked for a request, until it ends; when that fails, it fails."""

        async def guarded() -> None:
            request_id.set(pending.request_id)
            try:
                await work
            except errors.RequestError as error:
                self._drop(pending, error)
            except Exception as error:  # a bug; the request must not wait for ever because of it
                logger.error("unexpected %s", type(error).__name__, exc_info=error)
                self._drop(pending, errors.EngineFailed("an internal error ended this request"))

        task = asyncio.create_task(guarded(), name=f"scorers of {pending.id}")
        pending.tasks.add(task)
        task.add_done_callback(pending.tasks.discard)

    async def _ask_scorer(self, pending: Pending, scores: Awaitable[list[float]]) -> None:
        """A score request of an outside scorer; no worker is needed."""
        self._answer(pending, Scored(pending.id, await scores, 0))

    async def _judge(self, pending: Pending, judging: Judging, ask: Ask) -> None:
        """Ask a parked job's scorers, and tell the worker that has it by then."""
        judged = await judging.judge(ask)
        if pending.worker is not None and pending.parked is ask:
            pending.parked, pending.begun = None, True
            self.replicas[pending.worker].send(frame(judged))

    def dispatch(self) -> None:
        """Hand waiting work to the workers that can take it; a replica calls it when there is one more."""
        ready = [replica.rank for replica in self.replicas if replica.ready]
        expected = any(not (replica.ready or replica.given_up) for replica in self.replicas)
        for rank, pending in self._dispatcher.assign(ready, more_to_come=expected):
            if pending.suspect:
                told = {"request_id": pending.request_id}
                logger.info("request %s runs apart on worker %d", pending.id, rank, extra=told)
            self.replicas[rank].send(pending.frame)

    def on_event(self, replica: Replica, event: Event) -> None:
        """Pass an event to whom it concerns."""
        if isinstance(event, AdaptersSet):
            self.adapters.answered(replica.rank, event)
        pending = self._pending.get(subject(event) or "")
        if pending is None or pending.worker != replica.rank:
            return  # cancelled meanwhile
        if isinstance(event, Begun):
            pending.begun = True
            if pending.begun_at is None:
                pending.begun_at, pending.begun_step = time.monotonic(), replica.steps
        elif isinstance(event, Ask) and pending.judging is not None:
            pending.parked, pending.begun = event, False
            self._meanwhile(pending, self._judge(pending, pending.judging, event))
        elif isinstance(event, Answer):
            self._answer(pending, event)
        elif not pending.deliver(event):
            logger.error("job %s: the second run differs from the first", pending.id)
            self._drop(pending, errors.EngineFailed("the worker was lost and the text could not be continued"))

    def on_lost(self, replica: Replica) -> None:
        """A worker is gone, or did not start. What it had runs again, but for what is convicted of its death. When no
        worker is left that anybody waits for (one failed start may be chance), everything fails."""
        self.adapters.answered(replica.rank, None)
        had = self._dispatcher.lost(replica.rank)
        convicted = [pending for pending in had if pending.convicted]
        if had:
            logger.warning(
                "%s had %d requests; after its death %d run apart from new ones",
                replica.name,
                len(had),
                self._dispatcher.suspects,
                extra={"had": [pending.id for pending in had], "convicted": [pending.id for pending in convicted]},
            )
        for pending in convicted:
            self._drop(pending, errors.WorkerLost("the worker was lost twice while it ran nothing but this request"))
        if self.given_up:
            self._fail_all(errors.Unavailable("the worker was lost and could not be restarted"))
        self.dispatch()

    def _answer(self, pending: Pending, answer: Answer) -> None:
        del self._pending[pending.id]
        self._taken[pending.priority] -= 1
        now = time.monotonic()
        if isinstance(answer, Failed):
            seconds = 0.0 if pending.begun_at is None else round(now - pending.begun_at, 3)
            told = {
                "request_id": pending.request_id,
                "error": answer.kind,
                "worker": pending.worker,
                "seconds": seconds,
            }
            logger.info("request %s ends without an answer", pending.id, extra=told)
        if not pending.priority:
            self._throughput.finished(now)
        self._throughput.taken(self._taken[0], self.config.max_queue, now)
        self._dispatcher.remove(pending)
        pending.close(answer)
        if not self._pending:
            self._idle.set()
        self.dispatch()  # the worker may have been kept free for the next suspects

    def _drop(self, pending: Pending, error: errors.RequestError) -> None:
        """Answer instead of the worker, and tell it, if it has the request."""
        if pending.worker is not None:
            self.replicas[pending.worker].send(frame(Cancel(pending.id)))
        self._answer(pending, Failed.of(pending.id, error))

    def _fail_all(self, error: errors.RequestError, least_priority: int = 0) -> None:
        for pending in list(self._pending.values()):
            if pending.priority >= least_priority:
                self._drop(pending, error)

    def _look_after(self, seconds: float, pending: Pending) -> None:
        pending.timer = asyncio.get_running_loop().call_later(seconds, self._deadline_passed, pending)

    def _deadline_passed(self, pending: Pending) -> None:
        """A worker that has the job ends it at its next step, a running one with what is there; only while no worker
        has it, and for scores, the word is ours."""
        if pending.is_job and pending.worker is not None:
            self._look_after(DEADLINE_SECONDS, pending)
        else:
            message = f"the deadline passed while the request was {'scored' if pending.tasks else 'queued'}"
            self._drop(pending, errors.DeadlineExceeded(message, "timeout"))

"""Running a plan: its jobs' events merged into one sequence, counted, and cancelled when nobody listens any more."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from opentelemetry import context, trace
from opentelemetry.trace import Status, StatusCode

from server.api.convert import Plan
from server.api.frontend import Frontend
from server.api.telemetry import request_attributes, response_attributes, step_spans
from server.errors import InvalidRequest
from server.front.engine import JobStream
from server.log import note
from server.types import Job, JobResult
from server.wire.messages import Event, Failed, Finished, Progress, Started, Timed

MERGED_EVENTS = 64


async def events(frontend: Frontend, plan: Plan) -> AsyncGenerator[tuple[int, Event]]:
    """(prompt index, event) as they come, until every job has finished. Raises the error of the first job that fails.
    Close it (`aclosing`) to drop what is left: jobs leave before the next denoising step."""
    best_of, guidance = plan.sampling.best_of, plan.guidance
    note(completion_id=plan.id, model=plan.model, prompts=len(plan.jobs), best_of=best_of)
    note(guidance=guidance.method, gradient_steps=guidance.inner_steps)
    if guidance.resample is not None:
        note(resample=guidance.resample.by)
    if trace.get_current_span().is_recording():
        plan = replace(plan, jobs=tuple(replace(job, timed=True) for job in plan.jobs))
    with frontend.shares.taken(best_of * len(plan.jobs)):
        streams = frontend.submit(plan.jobs, plan.model, plan.asked.metadata)
        merged: asyncio.Queue[tuple[int, Event]] = asyncio.Queue(MERGED_EVENTS)
        records = [_Record(frontend, plan, job, stream) for job, stream in zip(plan.jobs, streams, strict=True)]
        pumps = [
            asyncio.create_task(_pump(index, stream, merged), name=f"pump {plan.jobs[index].id}")
            for index, stream in enumerate(streams)
        ]
        try:
            unfinished = len(streams)
            while unfinished:
                index, event = await merged.get()
                records[index].see(event)
                if isinstance(event, Failed):
                    error = event.error()
                    if isinstance(error, InvalidRequest) and error.param == "messages":
                        error.param = plan.asked.source
                    raise error
                unfinished -= isinstance(event, Finished)
                yield index, event
        finally:
            # All of it before anything can wait: cancelled a second time here, the rest would be left undone.
            for stream, pump, record in zip(streams, pumps, records, strict=True):
                pump.cancel()
                await stream.aclose()  # does not wait
                record.close()
            note(**_account(records))
            await asyncio.gather(*pumps, return_exceptions=True)


async def results(frontend: Frontend, plan: Plan) -> list[JobResult]:
    """The answers of all jobs, in the order of the prompts. Cancelling the call cancels the jobs."""
    answers: dict[int, JobResult] = {}
    async with aclosing(events(frontend, plan)) as sequence:
        async for index, event in sequence:
            if isinstance(event, Finished):
                answers[index] = event.result
    return [answers[index] for index in range(len(plan.jobs))]


async def _pump(index: int, stream: JobStream, merged: asyncio.Queue[tuple[int, Event]]) -> None:
    async for event in stream:
        await merged.put((index, event))


class _Record:
    """One prompt's life, from its submission on, in metrics and in two spans: `queue`, and the generation."""

    def __init__(self, frontend: Frontend, plan: Plan, job: Job, stream: JobStream) -> None:
        self._metrics, self._tracer = frontend.metrics, frontend.tracer
        self._awaited = not frontend.priority  # by a client: how long a batch waits says nothing of the server
        self._plan, self._job, self._stream = plan, job, stream
        self._arrived = time.monotonic()
        self._parent = context.get_current()
        place: dict[str, int] = {"entrgi.prompt_index": job.prompt_index}
        self._span = self._tracer.start_span("queue", self._parent, attributes=place, start_time=_wall(self._arrived))
        self._gauge = self._metrics.requests_waiting.labels(plan.model)
        self._gauge.inc()
        self._first_text = self._ended = False
        self._begun: float | None = None
        self._left = self._arrived
        self.result: JobResult | None = None

    @property
    def times(self) -> tuple[float, float]:
        """Seconds of waiting for a worker and of its work, when the job is over."""
        begun = self._left if self._begun is None else self._begun
        return max(0.0, begun - self._arrived), max(0.0, self._left - begun)

    def see(self, event: Event) -> None:
        """Count an event."""
        now = time.monotonic()
        match event:
            case Started():
                self._begin(self._stream.begun_at or now)
            case Progress(revealed=revealed):
                if any(position == 0 for position, _ in revealed):
                    self._text_is_there(now)
            case Finished(result=result):
                self._begin(now)
                self._text_is_there(now)
                self._finished(result, now)
            case Failed(kind=kind):
                self._span.set_status(Status(StatusCode.ERROR))
                self._fail(kind)
            case Timed() if self._span.is_recording():
                step_spans(self._tracer, trace.set_span_in_context(self._span, self._parent), event)

    def close(self) -> None:
        """The job is over, one way or another; without an answer, the client has left."""
        self._gauge.dec()
        self._left = time.monotonic()
        if not self._ended:
            self._metrics.request_success.labels(self._plan.model, "abort").inc()
            self._fail("client_closed_request")

    def _begin(self, moment: float) -> None:
        """A worker began at this moment, of which the first report counts."""
        if self._begun is not None:
            return
        self._begun = moment
        metrics, model = self._metrics, self._plan.model
        if self._awaited:
            metrics.queue_time.labels(model).observe(max(0.0, moment - self._arrived))
        self._gauge.dec()
        self._gauge = metrics.requests_running.labels(model)
        self._gauge.inc()
        recording, at = self._span.is_recording(), _wall(moment)
        operation = "chat" if self._plan.chat else "text_completion"
        self._span.end(at)
        self._span = self._tracer.start_span(
            f"{operation} {model}",
            self._parent,
            attributes=request_attributes(self._plan, self._job, operation) if recording else None,
            start_time=at,
        )

    def _text_is_there(self, now: float) -> None:
        if self._awaited and not self._first_text:
            self._first_text = True
            labels = self._plan.model, self._job.guidance.method
            self._metrics.time_to_first_token.labels(*labels).observe(now - self._arrived)

    def _fail(self, kind: str) -> None:
        self._ended = True
        self._span.set_attribute("error.type", kind)
        self._span.end()

    def _finished(self, result: JobResult, now: float) -> None:
        self._ended, self.result = True, result
        if self._span.is_recording():
            self._span.set_attributes(response_attributes(self._job, result))
        self._span.end()
        metrics, job, model = self._metrics, self._job, self._plan.model
        if self._awaited:
            metrics.e2e_latency.labels(model, job.guidance.method).observe(now - self._arrived)
        metrics.prompt_tokens.labels(model).inc(len(job.prompt_ids) + len(job.suffix_ids))
        tokens = sum(trajectory.completion_tokens for trajectory in result.trajectories)
        metrics.generation_tokens.labels(model).inc(tokens)
        reason = result.trajectories[result.chosen[0]].finish_reason
        metrics.request_success.labels(model, reason).inc()
        method = job.guidance.method
        if method != "none" or job.guidance.resample is not None:
            # In one order, whatever the client's: each combination of models is one time series.
            names = sorted(reward.model for reward in job.guidance.rewards)
            metrics.guided_requests.labels(method, "+".join(names)).inc()
        for index in result.chosen:
            for name, reward in result.trajectories[index].rewards.items():
                if reward is not None:
                    metrics.observe_reward(name, method, reward)


def _account(records: Sequence[_Record]) -> dict[str, object]:
    """What the access line tells of the answers: the longest wait and computation, and where there are any, the tokens
    of all trajectories and how the texts of the best ended."""
    waits, computed = zip(*(record.times for record in records), strict=True)
    told: dict[str, object] = {"queue_ms": round(1e3 * max(waits), 1), "generation_ms": round(1e3 * max(computed), 1)}
    if results := [record.result for record in records if record.result]:
        told["tokens"] = sum(each.completion_tokens for result in results for each in result.trajectories)
        best = [result.trajectories[result.chosen[0]] for result in results]
        # A stop string is the client's text; what else ended a text is a word of ours.
        endings = {"stop" if each.finish_reason == "stop" else each.stop_reason or "length" for each in best}
        told["finish_reason"] = ", ".join(sorted(endings))
    return told


def _wall(moment: float) -> int:
    """A moment of `time.monotonic` as nanoseconds of the wall clock."""
    return time.time_ns() - int((time.monotonic() - moment) * 1e9)

"""What is left of a request when its failure and its client's leaving come together: nothing."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from server.api.convert import Plan
from server.api.frontend import Frontend
from server.api.generation import results
from server.api.metrics import Metrics
from server.errors import RequestError
from server.types import DiffusionParams, Job, SamplingParams
from server.wire.messages import Event, Failed


class Stream:
    """A job's events: its failure, or none ever."""

    begun_at = None

    def __init__(self, *events: Event) -> None:
        self._events = list(events)
        self.closed = False

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Event:
        if not self._events:
            await asyncio.Event().wait()
        return self._events.pop()

    async def aclose(self) -> None:
        self.closed = True


def job(index: int) -> Job:
    return Job(f"job-{index}", (1, 2), SamplingParams(max_tokens=4), DiffusionParams(steps=4), prompt_index=index)


@pytest.mark.parametrize("turns", range(8))
def test_a_client_that_leaves_while_its_request_fails_leaves_nothing_behind(turns: int) -> None:
    """The cancellation comes so many turns of the loop after the start, that is before, in and after the clean-up."""
    metrics = Metrics(cast(Any, None))
    streams = [Stream(Failed("job-0", "deadline", "too late", "timeout")), Stream()]

    class Engine:
        config = type("Config", (), {"max_queue": 8})

        def check_room(self, jobs: int = 1) -> None: ...

        def submit(self, job: Job) -> Any:
            return streams[job.prompt_index]

    async def race() -> None:
        frontend = Frontend(cast(Any, Engine()), cast(Any, None), cast(Any, None), metrics)
        plan = Plan("cmpl-1", 0, "dlm", False, (job(0), job(1)), False, False, None)
        working = asyncio.create_task(results(frontend, plan))
        for _ in range(turns):
            await asyncio.sleep(0)
        working.cancel()
        with pytest.raises((asyncio.CancelledError, RequestError)):
            await working
        frontend.close()

    asyncio.run(race())
    for gauge in (metrics.requests_waiting, metrics.requests_running):
        assert all(sample.value == 0 for family in gauge.collect() for sample in family.samples)
    assert [stream.closed for stream in streams] == [bool(turns)] * 2

"""Jobs through a fresh engine in this process; none may fail."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from server.types import Job, JobResult
from server.wire.messages import Failed, Finished
from server.worker.runner import Runner


def run(pair: Any, jobs: Iterable[Job], **options: Any) -> dict[str, JobResult]:
    """All jobs at once; `options` are the runner's, `rewards` the reward models if not all of the pair's."""
    runner = Runner(pair.loaded, options.pop("rewards", pair.rewards), **options)
    for job in jobs:
        runner.add(job, now=0.0)
    results = {}
    while runner.has_work:
        for event in runner.step():
            assert not isinstance(event, Failed), event
            if isinstance(event, Finished):
                results[event.job_id] = event.result
    assert runner.scheduler.running_trajectories == runner.scheduler.waiting_trajectories == 0
    return results

"""Jobs through a runner in this process, until nothing is left."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from server.types import Job
from server.wire.messages import Failed, Finished
from server.worker.runner import Runner


def answers(runner: Runner, jobs: Iterable[Job]) -> tuple[dict[str, Any], dict[str, Failed]]:
    """What became of each job: token ids of its trajectories, or its failure."""
    for job in jobs:
        runner.add(job, now=0.0)
    finished: dict[str, Any] = {}
    failed: dict[str, Failed] = {}
    while runner.has_work:
        for event in runner.step():
            if isinstance(event, Finished):
                finished[event.job_id] = [trajectory.token_ids for trajectory in event.result.trajectories]
            elif isinstance(event, Failed):
                failed[event.job_id] = event
    assert runner.scheduler.running_trajectories == runner.scheduler.waiting_trajectories == 0
    return finished, failed

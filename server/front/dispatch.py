"""Which worker gets which job, and who is to blame when a worker dies. Pure bookkeeping: nothing is sent from here.

Work goes to the ready worker with the least of it. When a worker dies, what it had runs again, and some job may have
killed it (*poison*: a job that crashes whatever runs it). Those that it had not begun to compute for are innocent and
go to any other worker at once. Those that it had begun are *suspects*. A suspect runs alone: nothing else is in its
worker meanwhile, so a second death convicts the guilty one and no other, and poison takes no neighbour along twice. The
price is paid after a death only: suspects run one after the other, each worker one at a time, before new work starts
there. A worker killed from outside costs its jobs that, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable

from server.front.pending import Pending
from server.types import Job
from server.wire.messages import Score

MAX_DEATHS = 2  # of workers that were computing for a job; then it fails
MAX_LOSSES = 3  # of workers that had a job queued: as suspicious as one death (it may break them by its arrival)
CHARACTERS_A_TOKEN = 4


def job_cost(job: Job) -> float:
    """Tokens that pass through a model for a job, about: trajectories x steps x canvas, and M reward passes a step."""
    canvas = len(job.prompt_ids) + job.sampling.max_tokens + len(job.suffix_ids)
    steps = min(job.diffusion.steps, job.sampling.max_tokens)
    passes = 1 + (job.guidance.gradient_steps if job.guidance.uses_gradient else 0)
    return float(job.sampling.best_of * steps * canvas * passes)


def score_cost(request: Score) -> float:
    """The same for a score request: each text passes once."""
    characters = sum(
        len(response) + sum(len(message.content) for message in conversation)
        for conversation, response in request.items
    )
    return 1.0 + characters / CHARACTERS_A_TOKEN


class Dispatcher:
    """What waits, and what each of `workers` workers has."""

    def __init__(self, workers: int) -> None:
        self._held: list[dict[str, Pending]] = [{} for _ in range(workers)]
        self._outstanding = [0.0] * workers
        self._waiting: dict[str, Pending] = {}
        self._suspects: dict[str, Pending] = {}

    def add(self, pending: Pending) -> None:
        """New work; it waits for `assign`."""
        self._waiting[pending.id] = pending

    def remove(self, pending: Pending) -> None:
        """It has its answer."""
        if pending.worker is None:
            self._waiting.pop(pending.id, None)
            self._suspects.pop(pending.id, None)
        else:
            self._release(pending)

    def outstanding(self, worker: int) -> float:
        """Estimated work that a worker has, in the unit of `job_cost`."""
        return self._outstanding[worker]

    @property
    def suspects(self) -> int:
        """How many suspects have no answer yet."""
        return len(self._suspects) + sum(self._has_suspect(worker) for worker in range(len(self._held)))

    def jobs_of(self, worker: int) -> list[Pending]:
        """What a worker has, oldest first."""
        return list(self._held[worker].values())

    def assign(self, ready: Iterable[int], *, more_to_come: bool) -> list[tuple[int, Pending]]:
        """Give waiting work to the `ready` workers; returns who gets what. `more_to_come`: another worker is about to
        be ready."""
        workers = list(ready)
        empty = [worker for worker in workers if not self._held[worker]]
        given = [self._give(worker, _first(self._suspects)) for worker in empty[: len(self._suspects)]]
        open_to_all = [worker for worker in workers if not self._has_suspect(worker)]
        if self._suspects and open_to_all and len(open_to_all) == len(workers) and not more_to_come:
            # All are busy, and always will be: one takes nothing new until it is empty and can take a suspect.
            open_to_all.remove(min(open_to_all, key=self.outstanding))
        while self._waiting and open_to_all:
            given.append(self._give(min(open_to_all, key=self.outstanding), _first(self._waiting)))
        return given

    def lost(self, worker: int) -> list[Pending]:
        """A worker has died. What it had waits again, suspects apart, ahead of younger work; returns the convicted,
        which are forgotten here."""
        convicted: list[Pending] = []
        suspects: dict[str, Pending] = {}
        innocent: dict[str, Pending] = {}
        for pending in self.jobs_of(worker):
            self._release(pending)
            if pending.begun:
                pending.deaths += 1
            else:
                pending.losses += 1
                pending.deaths += pending.losses % MAX_LOSSES == 0
            pending.begun = False
            if pending.deaths >= MAX_DEATHS:
                convicted.append(pending)
            elif pending.deaths:
                suspects[pending.id] = pending
            else:
                innocent[pending.id] = pending
        self._suspects |= suspects
        self._waiting = innocent | self._waiting
        return convicted

    def _has_suspect(self, worker: int) -> bool:
        held = self._held[worker]  # a suspect is alone
        return len(held) == 1 and next(iter(held.values())).deaths > 0

    def _give(self, worker: int, pending: Pending) -> tuple[int, Pending]:
        pending.worker = worker
        # Scores are not announced: the worker computes them as they come.
        pending.begun = not pending.is_job
        self._held[worker][pending.id] = pending
        self._outstanding[worker] += pending.cost
        return worker, pending

    def _release(self, pending: Pending) -> None:
        if pending.worker is None:
            return
        held = self._held[pending.worker]
        held.pop(pending.id, None)
        # Not by subtraction alone: rounding would leave an idle worker with a load.
        self._outstanding[pending.worker] = self._outstanding[pending.worker] - pending.cost if held else 0.0
        pending.worker = None


def _first(queue: dict[str, Pending]) -> Pending:
    """Take the oldest out of a queue."""
    return queue.pop(next(iter(queue)))

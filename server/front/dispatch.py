"""Which worker gets which request, and which request is to blame when a worker dies. Pure bookkeeping: nothing is sent
from here.

Work goes to the ready worker with the least of it. When a worker dies, what it had runs again. It may have been killed
from outside, or by one of the requests that it was computing (*poison*: a request that crashes whatever runs it). Which
of the two it was shows only when they run again, so they are *suspects* until they have their answers:

- Requests that the worker had not begun to compute are innocent, the first two times; any worker takes them at once.
  So are those for which it waited: what outside scorers are asked about is not computed.
- The n that it was computing run again in groups of about sqrt(n). A group has a worker to itself.
- When a worker dies of a group, the requests of that group run again alone, one after the other.
- A death while a request is alone counts against it, and the second one convicts it.

So only poison, or a request that is hit from outside twice while it is alone, gets an error, and no request crashes
with others more than twice. Groups of sqrt(n) are the cheapest way to find one culprit among n in two stages (Dorfman
1943, "The detection of defective members of large populations"): a kill from outside costs sqrt(n) group runs rather
than n lone ones, and poison one more death of a worker (four) than if all suspects were alone at once. Every death
brings a request it concerns one stage further, so nothing goes round in circles, however many are poison.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import isqrt

from server.budget import Cost
from server.front.pending import Pending
from server.types import Job
from server.wire.messages import Score

SUSPICIOUS_LOSSES = 3  # of workers that had the request queued: it may break them by its arrival
CHARACTERS_A_TOKEN = 4


def cost_of(work: Job | Score) -> float:
    """Tokens that pass through a model, about. For a job: trajectories x steps x canvas, and M reward passes a step;
    for a score request: each text passes once."""
    if isinstance(work, Score):
        characters = sum(
            len(response) + sum(len(message.content) for message in conversation)
            for conversation, response in work.items
        )
        return 1.0 + characters / CHARACTERS_A_TOKEN
    passes = 1 + work.guidance.inner_steps
    return float(work.sampling.best_of * steps_of(work) * Cost.of(work).tokens * passes)


def steps_of(work: Job) -> int:
    """Denoising steps that reveal something, at most."""
    return min(work.diffusion.steps, work.sampling.max_tokens)


class Dispatcher:
    """What waits, and what each of `workers` workers has."""

    def __init__(self, workers: int) -> None:
        self._held: list[dict[str, Pending]] = [{} for _ in range(workers)]
        self._waiting: dict[str, Pending] = {}
        self._groups: list[dict[str, Pending]] = []  # suspects that wait, oldest first

    def add(self, pending: Pending) -> None:
        """New work; it waits for `assign`."""
        self._waiting[pending.id] = pending

    def remove(self, pending: Pending) -> None:
        """It has its answer."""
        for book in (self._waiting, *self._held, *self._groups):
            book.pop(pending.id, None)
        self._groups = [group for group in self._groups if group]

    def outstanding(self, worker: int) -> float:
        """Estimated work that a worker has, in the unit of `cost_of`."""
        return sum(pending.cost for pending in self._held[worker].values())

    @property
    def suspects(self) -> int:
        """How many suspects have no answer yet."""
        return sum(pending.suspect for book in (*self._held, *self._groups) for pending in book.values())

    def assign(self, ready: Iterable[int], *, more_to_come: bool) -> list[tuple[int, Pending]]:
        """Give waiting work to the `ready` workers; returns who gets what. `more_to_come`: another worker is about to
        be ready."""
        workers = list(ready)
        given: list[tuple[int, Pending]] = []
        for worker in workers:
            if self._groups and not self._held[worker]:
                given += [self._give(worker, pending) for pending in self._groups.pop(0).values()]
        open_to_all = [worker for worker in workers if not self._has_suspects(worker)]
        if self._groups and open_to_all and len(open_to_all) == len(workers) and not more_to_come:
            # All are busy, and always will be: one takes nothing new until it is empty and can take a group.
            open_to_all.remove(min(open_to_all, key=self.outstanding))
        while self._waiting and open_to_all:
            oldest = self._waiting.pop(next(iter(self._waiting)))
            given.append(self._give(min(open_to_all, key=self.outstanding), oldest))
        return given

    def lost(self, worker: int) -> list[Pending]:
        """A worker has died. Returns what it had, oldest first. The convicted are forgotten here; the others wait
        again, innocent ones ahead of younger work."""
        were_apart = self._has_suspects(worker)
        had = list(self._held[worker].values())
        self._held[worker] = {}
        for pending in had:
            pending.losses += not pending.begun
            pending.suspect = were_apart or pending.begun or pending.losses >= SUSPICIOUS_LOSSES
            pending.worker, pending.begun, pending.parked = None, False, None
        suspects = [pending for pending in had if pending.suspect]
        if len(had) == len(suspects) == 1:
            had[0].lone_deaths += 1
        size = 1 if were_apart else max(1, isqrt(len(suspects)))
        again = [pending for pending in suspects if not pending.convicted]
        groups = [again[start : start + size] for start in range(0, len(again), size)]
        self._groups += [{pending.id: pending for pending in group} for group in groups]
        self._waiting = {pending.id: pending for pending in had if not pending.suspect} | self._waiting
        return had

    def _has_suspects(self, worker: int) -> bool:
        return any(pending.suspect for pending in self._held[worker].values())

    def _give(self, worker: int, pending: Pending) -> tuple[int, Pending]:
        pending.worker = worker
        # Scores are not announced: the worker computes them as they come.
        pending.begun = not pending.is_job
        self._held[worker][pending.id] = pending
        return worker, pending

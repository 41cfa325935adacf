"""Who runs in the next denoising step. Pure Python: it counts tokens and never sees a tensor.

First come, first served within a priority (a lower number goes first). The K trajectories of a job are admitted one by
one as room allows, so a job may run in parts. Strict order means no starvation: when the head of the queue does not
fit, nothing behind it overtakes, and running trajectories leave after a bounded number of steps. A trajectory larger
than the budget, but not larger than what memory takes, runs alone.

What bounds admission is what running trajectories hold together: canvas tokens in the forward that they share, and the
reward models' cached conversations. Rows of logits and reward-model tokens do not: that part of a step runs in
micro-batches (worker/microbatch), as many as it takes.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from server.budget import Budget, Cost
from server.types import Job


@dataclass(frozen=True, slots=True)
class Ticket:
    """The right of one trajectory to run: trajectory `index` of `job`."""

    job: Job
    index: int


@dataclass(order=True, slots=True)
class _Waiting:
    priority: int
    order: int
    job: Job = field(compare=False)
    cost: Cost = field(compare=False)
    next_index: int = field(default=0, compare=False)


class Scheduler:
    """Admits trajectories under a budget and forgets them when they leave. `largest` bounds a single trajectory; by
    default it is the budget itself."""

    def __init__(self, budget: Budget, largest: Budget | None = None) -> None:
        self.budget = budget
        self.largest = largest or budget
        self._waiting: list[_Waiting] = []
        self._running: dict[tuple[str, int], Cost] = {}
        self._cached: dict[str, int] = {}  # cached tokens of jobs that have begun
        self._left: dict[str, int] = {}  # trajectories of those that have not left yet
        self._order = 0
        self._tokens = 0
        self._grown = 0  # cached tokens of running trajectories' own

    @property
    def waiting_jobs(self) -> list[Job]:
        """Jobs of which at least one trajectory waits, in no particular order."""
        return [entry.job for entry in self._waiting]

    @property
    def waiting_trajectories(self) -> int:
        """Trajectories that wait for room."""
        return sum(entry.job.sampling.best_of - entry.next_index for entry in self._waiting)

    @property
    def running_trajectories(self) -> int:
        """Trajectories that hold a part of the budget."""
        return len(self._running)

    def add(self, job: Job, cost: Cost | None = None) -> None:
        """Queue a job. Raises InvalidRequest when one trajectory alone could never run."""
        cost = cost or Cost.of(job)
        cost.check(self.largest)
        heapq.heappush(self._waiting, _Waiting(job.priority, self._order, job, cost))
        self._order += 1

    def admit(self) -> list[Ticket]:
        """Trajectories that start with the next step, in the order in which their jobs came."""
        tickets: list[Ticket] = []
        while (entry := self._next()) is not None and self._fits(entry):
            self._take(entry)
            tickets.append(Ticket(entry.job, entry.next_index))
            entry.next_index += 1
            if entry.next_index == entry.job.sampling.best_of:
                self._waiting.remove(entry)
                heapq.heapify(self._waiting)
        return tickets

    def release(self, ticket: Ticket) -> None:
        """A trajectory has finished; its share of the budget is free."""
        self._give_back(ticket.job.id, ticket.index)
        self._left[ticket.job.id] -= 1
        if not self._left[ticket.job.id]:
            self._forget(ticket.job.id)

    def drop(self, job_id: str) -> int:
        """Forget a job, waiting or running; returns how many trajectories it had here (0: unknown)."""
        dropped = sum(
            entry.job.sampling.best_of - entry.next_index for entry in self._waiting if entry.job.id == job_id
        )
        self._waiting = [entry for entry in self._waiting if entry.job.id != job_id]
        heapq.heapify(self._waiting)
        for key in [key for key in self._running if key[0] == job_id]:
            self._give_back(*key)
            dropped += 1
        self._forget(job_id)
        return dropped

    def _next(self) -> _Waiting | None:
        """The head of the queue; but while it waits for the cache, the first job that has begun: its cache is there
        already, and it must end for the cache to be given back."""
        if not self._waiting:
            return None
        head = self._waiting[0]
        if head.job.id in self._cached or not self._cached or self._cache_fits(head.cost, begun=False):
            return head
        return min((entry for entry in self._waiting if entry.job.id in self._cached), default=None)

    def _cache_fits(self, cost: Cost, *, begun: bool) -> bool:
        more = cost.grown_tokens + (0 if begun else cost.cached_tokens)
        held = sum(self._cached.values()) + self._grown
        return not more or held + more <= self.budget.cached_tokens

    def _fits(self, entry: _Waiting) -> bool:
        if not self._running:
            return True
        return (
            len(self._running) < self.budget.trajectories
            and self._tokens + entry.cost.tokens <= self.budget.tokens
            and self._cache_fits(entry.cost, begun=entry.job.id in self._cached)
        )

    def _take(self, entry: _Waiting) -> None:
        if not entry.next_index:
            self._cached[entry.job.id] = entry.cost.cached_tokens
            self._left[entry.job.id] = entry.job.sampling.best_of
        self._running[entry.job.id, entry.next_index] = entry.cost
        self._tokens += entry.cost.tokens
        self._grown += entry.cost.grown_tokens

    def _give_back(self, job_id: str, index: int) -> None:
        cost = self._running.pop((job_id, index))
        self._tokens -= cost.tokens
        self._grown -= cost.grown_tokens

    def _forget(self, job_id: str) -> None:
        self._cached.pop(job_id, None)
        self._left.pop(job_id, None)

"""Who runs in the next denoising step. Pure Python: it counts tokens and rows and never sees a tensor.

First come, first served within a priority (a lower number goes first). The K trajectories of a job are admitted one by
one as room allows, so a job may run in parts. Strict order means no starvation: when the head of the queue does not
fit, nothing behind it overtakes, and running trajectories leave after a bounded number of steps.
"""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass, field

from server.errors import InvalidRequest
from server.types import Job


@dataclass(frozen=True, slots=True)
class Budget:
    """What may share one denoising step: packed canvas tokens (classifier-free guidance counts twice), guided rows
    (masked positions under a gradient method; each costs V logits several times over) and trajectories."""

    tokens: int = 16_384
    guided_rows: int = 8_192
    trajectories: int = 256


@dataclass(frozen=True, slots=True)
class Cost:
    """What one trajectory of a job takes from the budget while it runs."""

    tokens: int
    guided_rows: int

    @classmethod
    def of(cls, job: Job) -> Cost:
        """The cost of each trajectory of `job`."""
        canvas = len(job.prompt_ids) + job.sampling.max_tokens + len(job.suffix_ids)
        forwards = 2 if job.diffusion.cfg_scale else 1
        return cls(canvas * forwards, job.sampling.max_tokens if job.guidance.uses_gradient else 0)


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
    next_index: int = field(default=0, compare=False)


class Scheduler:
    """Admits trajectories under a budget and forgets them when they leave."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self._waiting: list[_Waiting] = []
        self._running: dict[tuple[str, int], Cost] = {}
        self._order = 0
        self._tokens = 0
        self._guided_rows = 0

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

    def add(self, job: Job) -> None:
        """Queue a job. Raises InvalidRequest when one trajectory alone exceeds the budget and so could never run."""
        cost = Cost.of(job)
        if cost.tokens > self.budget.tokens:
            raise InvalidRequest(
                f"one trajectory takes {cost.tokens} canvas tokens, more than the {self.budget.tokens} "
                "that a denoising step of this server can hold",
                param="max_tokens",
            )
        if cost.guided_rows > self.budget.guided_rows:
            raise InvalidRequest(
                f"one guided trajectory takes {cost.guided_rows} rows of logits, more than the "
                f"{self.budget.guided_rows} that a denoising step of this server can hold",
                param="max_tokens",
            )
        heapq.heappush(self._waiting, _Waiting(job.priority, self._order, job))
        self._order += 1

    def admit(self) -> list[Ticket]:
        """Trajectories that start with the next step, in the order in which their jobs came."""
        tickets: list[Ticket] = []
        while self._waiting:
            head = self._waiting[0]
            cost = Cost.of(head.job)
            if not self._fits(cost):
                break
            self._take(head.job.id, head.next_index, cost)
            tickets.append(Ticket(head.job, head.next_index))
            head.next_index += 1
            if head.next_index == head.job.sampling.best_of:
                heapq.heappop(self._waiting)
        return tickets

    def release(self, ticket: Ticket) -> None:
        """A trajectory has finished; its share of the budget is free."""
        cost = self._running.pop((ticket.job.id, ticket.index))
        self._tokens -= cost.tokens
        self._guided_rows -= cost.guided_rows

    def drop(self, job_id: str) -> int:
        """Forget a job, waiting or running; returns how many trajectories it had here (0: unknown)."""
        dropped = sum(
            entry.job.sampling.best_of - entry.next_index for entry in self._waiting if entry.job.id == job_id
        )
        self._waiting = [entry for entry in self._waiting if entry.job.id != job_id]
        heapq.heapify(self._waiting)
        for key in [key for key in self._running if key[0] == job_id]:
            cost = self._running.pop(key)
            self._tokens -= cost.tokens
            self._guided_rows -= cost.guided_rows
            dropped += 1
        return dropped

    def shares(self) -> Counter[str]:
        """Running trajectories of each job."""
        return Counter(job_id for job_id, _ in self._running)

    def _fits(self, cost: Cost) -> bool:
        return (
            len(self._running) < self.budget.trajectories
            and self._tokens + cost.tokens <= self.budget.tokens
            and self._guided_rows + cost.guided_rows <= self.budget.guided_rows
        )

    def _take(self, job_id: str, index: int, cost: Cost) -> None:
        self._running[job_id, index] = cost
        self._tokens += cost.tokens
        self._guided_rows += cost.guided_rows

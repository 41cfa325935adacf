"""The book of jobs: the only place that knows which jobs are here, and which trajectories run in the next denoising
step. It counts tokens and never sees a tensor.

First come, first served within a priority (a lower number goes first). The K trajectories of a job are admitted one by
one as room allows, so a job may run in parts; those that are resampled, which wait for each other, together or not at
all. Strict order means no starvation within a priority: when the head of the queue does not fit, no later job overtakes
it, and running trajectories leave after a bounded number of steps. A trajectory larger than the budget, but not larger
than what memory takes, runs alone. Jobs of batches (priority above 0) leave a part of the budget free, so that others
begin at once, if they can do without it.

What bounds admission is what running trajectories hold together: canvas tokens in the forward that they share, and
cached tokens: the reward models' conversations, and what a block-causal diffusion model keeps. Rows of logits and
reward-model tokens do not: that part of a step runs in as many parts as it takes (worker/failures).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from server.budget import Budget, Cost
from server.types import Job

if TYPE_CHECKING:
    from server.guidance.prefixes import RewardContext
    from server.guidance.resample import Particles
    from server.models.lora import Adapter
    from server.models.packing import Prefix
    from server.worker.trajectory import Trajectory

BATCH_SHARE = 0.75  # of trajectories and tokens: past it no trajectory of a batch begins


Rewards: TypeAlias = list[dict[str, float | None]]
"""Of each of K texts, by name; None for an outside scorer that has not answered."""


@dataclass(slots=True, eq=False)
class Entry:
    """A job from its arrival to its answer. `cost` is that of each of its trajectories.

    Trajectories below `admitted` have been given a share of the budget, and hold it until they are `finished`; the
    runner keeps them, by index, in `running` and then in `finished`. `contexts` is what its reward models read around
    the response, by name, `adapter` what the diffusion model runs with, `prefix` what a block-causal one keeps of the
    prompt, and `stopped` why it ends early (its deadline). `particles` is there when they are resampled.

    While outside scorers are `asked` for rewards, after so many steps or at the end (-1), it is parked: it takes part
    in nothing until they are `heard`. The others' `rewards` of the same texts are kept meanwhile, with the step. After
    a meeting it then has to be admitted once more, with its trajectories as they are.
    """

    job: Job
    cost: Cost
    queued_at: float
    adapter: Adapter | None = None
    admitted: int = 0
    running: dict[int, Trajectory] = field(default_factory=dict)
    finished: dict[int, Trajectory] = field(default_factory=dict)
    started_at: float | None = None
    contexts: dict[str, RewardContext] = field(default_factory=dict)
    prefix: Prefix | None = None
    stopped: str | None = None
    rewards: tuple[int, Rewards] | None = None
    asked: int | None = None
    heard: dict[str, list[float]] | None = None
    particles: Particles | None = None

    def park(self, step: int, rewards: Rewards) -> None:
        """Take part in nothing until the outside scorers that are asked after so many steps have answered, and hold
        nothing of the budgets meanwhile."""
        self.asked, self.rewards, self.contexts, self.prefix = step, (step, rewards), {}, None
        if self.running:
            self.admitted = 0
        for trajectory in self.running.values():
            trajectory.contexts, trajectory.prefix = {}, None

    @property
    def settled(self) -> tuple[int, ...]:
        """With block-causal attention, the tokens of the prompt's whole blocks."""
        return self.job.prompt_ids[: len(self.job.prompt_ids) - self.job.lead]

    @property
    def waiting(self) -> int:
        """How many of its trajectories wait for room."""
        return 0 if self.stopped or self.asked is not None else self.job.sampling.best_of - self.admitted

    @property
    def together(self) -> int:
        """How many of them begin at once."""
        return self.job.sampling.best_of if self.job.guidance.resample else 1

    @property
    def holding(self) -> int:
        """How many of them hold a share of the budget."""
        return self.admitted - len(self.finished)

    @property
    def caches(self) -> bool:
        """Whether what its trajectories share of the cache counts: from its first trajectory's beginning to its last
        one's end."""
        return bool(self.admitted and (self.holding or self.waiting))


class Book:
    """Every job that is queued or running, under a budget for what runs together. `largest` bounds a single
    trajectory; by default it is the budget itself."""

    def __init__(self, budget: Budget, largest: Budget | None = None) -> None:
        self.budget = budget
        self.largest = largest or budget
        self._entries: dict[str, Entry] = {}  # by job id, in the order of the queue

    def get(self, job_id: str) -> Entry | None:
        """The entry of a job, if it is here."""
        return self._entries.get(job_id)

    def __iter__(self) -> Iterator[Entry]:
        """All entries, in the order of the queue. They may be dropped meanwhile."""
        return iter(list(self._entries.values()))

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._entries

    @property
    def running(self) -> int:
        """Trajectories that hold a share of the budget."""
        return sum(entry.holding for entry in self)

    @property
    def waiting(self) -> int:
        """Trajectories that wait for room."""
        return sum(entry.waiting for entry in self)

    def add(self, job: Job, cost: Cost | None = None, now: float = 0.0, adapter: Adapter | None = None) -> None:
        """Queue a job. Raises InvalidRequest when one trajectory alone could never run, or those that must together."""
        cost = cost or Cost.of(job)
        cost.check(self.largest)
        if job.guidance.resample is not None:
            cost.check_together(self.budget, job.sampling.best_of)
        self._entries[job.id] = Entry(job, cost, now, adapter)
        if any(entry.job.priority > job.priority for entry in self):
            order = sorted(self._entries, key=lambda each: self._entries[each].job.priority)
            self._entries = {each: self._entries[each] for each in order}  # within a priority in order of arrival

    def drop(self, job_id: str) -> bool:
        """Forget a job and what it holds. Returns whether it was here."""
        return self._entries.pop(job_id, None) is not None

    def admit(self) -> tuple[Entry, range] | None:
        """Give the next trajectory, or those that begin with it, their share of the budget: their entry and indices, or
        None while there is no room."""
        begun = [entry for entry in self if entry.admitted]
        entry = self._next(begun)
        if entry is None or not self._fits(entry, begun):
            return None
        first, entry.admitted = entry.admitted, entry.admitted + entry.together
        return entry, range(first, entry.admitted)

    def _next(self, begun: list[Entry]) -> Entry | None:
        """The head of the queue; but while it waits for the cache, the first job that has begun: its cache is there
        already, and it must end for the cache to be given back."""
        head = next((entry for entry in self if entry.waiting), None)
        if head is None or self._cache_fits(head, begun) or not any(entry.caches for entry in begun):
            return head
        return next((entry for entry in begun if entry.waiting), None)

    def _fits(self, entry: Entry, begun: list[Entry]) -> bool:
        running = sum(each.holding for each in begun)
        held = sum(each.holding * each.cost.tokens for each in begun)
        before, tokens = entry.together - 1, entry.together * entry.cost.tokens
        share = 1.0 if entry.job.priority <= 0 else BATCH_SHARE
        if before >= share * self.budget.trajectories or tokens > share * self.budget.tokens:
            share = 1.0  # else it could begin only when nothing runs
        return not running or (
            running + before < share * self.budget.trajectories
            and held + tokens <= share * self.budget.tokens
            and self._cache_fits(entry, begun)
        )

    def _cache_fits(self, entry: Entry, begun: list[Entry]) -> bool:
        more = entry.together * entry.cost.grown_tokens + (0 if entry.caches else entry.cost.cached_tokens)
        shared = sum(each.cost.cached_tokens for each in begun if each.caches)
        grown = sum(each.holding * each.cost.grown_tokens for each in begun)
        return not more or shared + grown + more <= self.budget.cached_tokens

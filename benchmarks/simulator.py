"""A simulation of replicas: the real book of jobs, plans of steps and dispatcher, and a model of what a step costs in
place of tensors. `benchmarks.simulate` asks it questions.

Simulated are arrivals, queues, admission, steps and their sizes. Not simulated are texts (every trajectory takes all of
its steps), parts of steps that memory makes, and anything that fails; HTTP is a number of seconds.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.flops import Decoder, reward_forward, reward_prefix
from benchmarks.gpu.estimate import Canvas
from clients.loadgen import percentile
from server.budget import Budget, Cost
from server.diffusion.schedule import Step
from server.front.dispatch import Dispatcher, cost_of, steps_of
from server.front.pending import Pending
from server.types import DiffusionParams, GuidanceParams, Job, ModelInfo, SamplingParams, WeightedReward
from server.worker.book import Book, Entry
from server.worker.trajectory import Trajectory

INFO = ModelInfo("simulated", "dream", "", 2048, 152_064, 1, 2, 3, (2,), 128, "bfloat16", 0)
CostModel = Callable[[Sequence[Canvas], Sequence[Job], Sequence[Job]], float]
"""(canvases of a step, jobs that begin with it, jobs that end with it) -> seconds."""


@dataclass(frozen=True, slots=True)
class Load:
    """How requests are drawn. `best_of` are K with their shares; lengths of prompts and answers are log-normal, as
    (median, sigma, least, most); `steps` are the choices of T as shares of L; `guided` is the share that is steered,
    with M. Gaps between arrivals are gamma-distributed, with the coefficient of variation `burstiness` (1: Poisson)."""

    best_of: tuple[tuple[int, float], ...] = ((1, 0.6), (4, 0.3), (8, 0.1))
    prompt: tuple[float, float, int, int] = (90, 0.8, 20, 1024)
    answer: tuple[float, float, int, int] = (128, 0.5, 32, 512)
    steps: tuple[float, ...] = (1.0, 0.5)
    guided: float = 0.8
    gradient_steps: int = 3
    burstiness: float = 1.0

    def jobs(self, count: int, seed: int) -> list[Job]:
        """So many requests of one prompt each."""
        draw = random.Random(seed)

        def length(median: float, sigma: float, least: int, most: int) -> int:
            return round(min(most, max(least, median * draw.lognormvariate(0, sigma))))

        jobs = []
        for number in range(count):
            (best_of,) = draw.choices([k for k, _ in self.best_of], [share for _, share in self.best_of])
            tokens, prompt = length(*self.answer), length(*self.prompt)
            guided = draw.random() < self.guided
            guidance = GuidanceParams("entrgi", (WeightedReward("rm"),), self.gradient_steps) if guided else None
            sampling = SamplingParams(tokens, seed=number, best_of=best_of, n=1 if guided else best_of, ignore_eos=True)
            diffusion = DiffusionParams(max(1, round(tokens * draw.choice(self.steps))))
            jobs.append(Job(f"{seed}-{number}", (0,) * prompt, sampling, diffusion, guidance or GuidanceParams()))
        return jobs

    def arrivals(self, rate: float, count: int, seed: int) -> list[float]:
        """So many times in seconds, `rate` a second on average."""
        draw, shape = random.Random(seed), self.burstiness**-2
        return list(itertools.accumulate(draw.gammavariate(shape, 1 / (shape * rate)) for _ in range(count)))


def canvases(batch: Sequence[tuple[Trajectory, Step]]) -> list[Canvas]:
    """What the trajectories of a step bring: those of one job are equal until something is revealed."""
    first: set[str] = set()
    found = []
    for trajectory, step in batch:
        job, masked = trajectory.job, trajectory.masked
        shared = not trajectory.taken and job.id in first
        first.add(job.id)
        left, settled = int(masked.sum()), int(masked.argmax())
        prompt, length = len(job.prompt_ids), len(masked)
        found.append(Canvas(prompt + length, left, prompt + settled, length - settled, step.gradient_steps, shared))
    return found


def advance(trajectory: Trajectory, step: Step, front: float) -> None:
    """Reveal as many positions as the step does, so that of all that are revealed the share `front` is in front of the
    first masked one: a reward model has those in its cache."""
    masked = np.flatnonzero(trajectory.masked[step.start : step.stop]) + step.start
    left = len(trajectory.masked) - trajectory.left
    ahead = min(step.reveal, max(0, round(front * (left + step.reveal)) - int(trajectory.masked.argmax())))
    trajectory.masked[masked[:ahead]] = False
    trajectory.masked[masked[len(masked) - (step.reveal - ahead) :]] = False
    trajectory.cursor += 1
    trajectory.taken += 1


def around(judge: Decoder, begun: Sequence[Job], ended: Sequence[Job]) -> tuple[float, float]:
    """A reward model's operations for the conversations of guided jobs that begin, and for the final texts of those
    that end."""
    prompts = [len(job.prompt_ids) for job in begun if job.reads_rewards]
    final = [job for job in ended if job.reads_rewards for _ in range(job.sampling.best_of)]
    read = [len(job.prompt_ids) for job in final], [job.sampling.max_tokens for job in final]
    return reward_prefix(judge, [0] * len(prompts), prompts), reward_forward(judge, *read)


class Replica:
    """A worker: what `worker/runner` does in a step, with seconds in place of tensors."""

    def __init__(self, cost: CostModel, budget: Budget, front: float = 0.5) -> None:
        self.cost, self.front = cost, front
        self.book = Book(budget)
        self.batch: list[tuple[Trajectory, Step]] = []
        self.sizes: list[tuple[float, int, float]] = []  # of steps: seconds, trajectories, share of the canvas tokens

    def add(self, job: Job, now: float) -> None:
        """Queue a job."""
        reads = job.sampling.max_tokens + len(job.prompt_ids)
        self.book.add(job, Cost.of(job, reward_tokens=reads, cached_tokens=len(job.prompt_ids)), now)

    def begin(self, now: float) -> float | None:
        """Admit what fits and begin a step: the seconds that it takes, or None without work."""
        begun: list[Entry] = []
        for entry, indices in iter(self.book.admit, None):
            if entry.started_at is None:
                entry.started_at = now
                begun.append(entry)
            entry.running.update({index: Trajectory.start(entry.job, index, INFO) for index in indices})
        self.batch = [(t, step) for entry in self.book for t in entry.running.values() if (step := t.next_step())]
        if not self.batch:
            return None
        found = canvases(self.batch)
        left: dict[str, int] = {}  # masked positions of a job after this step
        for canvas, (trajectory, step) in zip(found, self.batch, strict=True):
            left[trajectory.job.id] = left.get(trajectory.job.id, 0) + canvas.masked - step.reveal
        ends = [entry.job for entry in self.book if not (entry.waiting or left[entry.job.id])]
        seconds = self.cost(found, [entry.job for entry in begun], ends)
        held = sum(entry.holding * entry.cost.tokens for entry in self.book)
        self.sizes.append((seconds, len(self.batch), held / self.book.budget.tokens))
        return seconds

    def end(self) -> list[Entry]:
        """The step is over: what it finished."""
        for trajectory, step in self.batch:
            advance(trajectory, step, self.front)
        self.batch = []
        done = []
        for entry in self.book:
            for index, trajectory in list(entry.running.items()):
                if trajectory.next_step() is None:
                    entry.finished[index] = entry.running.pop(index)
            if len(entry.finished) == entry.job.sampling.best_of:
                self.book.drop(entry.job.id)
                done.append(entry)
        return done


Route = Callable[[Sequence[dict[str, float]], random.Random], int]
"""What each replica has (estimated work by job) -> the one that gets the next job."""


def _round_robin() -> Route:
    turn = itertools.count()
    return lambda held, _: next(turn) % len(held)


def _two_choices(held: Sequence[dict[str, float]], draw: random.Random) -> int:
    return min(draw.sample(range(len(held)), min(2, len(held))), key=lambda replica: len(held[replica]))


POLICIES: dict[str, Callable[[], Route] | None] = {
    "least work": None,
    "fewest requests": lambda: lambda held, _: min(range(len(held)), key=lambda replica: len(held[replica])),
    "two choices": lambda: _two_choices,
    "round robin": _round_robin,
    "random": lambda: lambda held, draw: draw.randrange(len(held)),
}
"""Ways to choose a replica: this server's dispatcher; HAProxy's leastconn; Ray Serve's; plain turns; a Kubernetes
service with many clients."""


@dataclass(slots=True)
class Outcome:
    """What a run gave: (job, seconds from its arrival to its answer, seconds to its first step), and the replicas."""

    seconds: float = 0.0
    answered: list[tuple[Job, float, float]] = field(default_factory=list)
    replicas: list[Replica] = field(default_factory=list)

    def row(self, cost: CostModel) -> dict[str, Any]:
        """One line of a table. A request's slowdown is its latency over what it would take alone; fairness is Jain's
        index of the slowdowns (1: all equal)."""
        latencies = [latency for _, latency, _ in self.answered]
        waits = [wait for _, _, wait in self.answered]
        slow = [latency / alone(job, cost) for job, latency, _ in self.answered]
        sizes = [size for replica in self.replicas for size in replica.sizes]
        busy = sum(seconds for seconds, _, _ in sizes)
        tokens = sum(job.sampling.best_of * job.sampling.max_tokens for job, _, _ in self.answered)
        return {
            "requests_per_s": len(self.answered) / self.seconds,
            "tokens_per_s": tokens / self.seconds,
            "latency_p50": percentile(latencies, 50),
            "latency_p99": percentile(latencies, 99),
            "queue_p99": percentile(waits, 99),
            "slowdown_p50": percentile(slow, 50),
            "slowdown_p99": percentile(slow, 99),
            "fairness": fmean(slow) ** 2 / fmean(each * each for each in slow),
            "busy": busy / (self.seconds * len(self.replicas)),
            "trajectories": sum(seconds * count for seconds, count, _ in sizes) / busy,
            "memory_peak": max(share for _, _, share in sizes),
        }


def alone(job: Job, cost: CostModel) -> float:
    """Seconds that a job takes on an idle replica, about: as many steps as it has, with half of the answer masked."""
    prompt, length = len(job.prompt_ids), job.sampling.max_tokens
    half = Canvas(prompt + length, length // 2, prompt + length // 4, length - length // 4, job.guidance.inner_steps)
    return steps_of(job) * cost([half] * job.sampling.best_of, [], [])


def simulate(
    jobs: Sequence[Job],
    due: Sequence[float],
    replicas: Sequence[Replica],
    *,
    policy: str = "least work",
    in_flight: int | None = None,
    outside: float = 0.0,
    seed: int = 0,
) -> Outcome:
    """Send the jobs at the times `due` (seconds), or, with `in_flight`, so many at once and one for each answer.
    `outside` are the seconds that each answer takes from its last step to its client, or to the client's next job."""
    outcome = Outcome(replicas=list(replicas))
    dispatcher, route, draw = Dispatcher(len(replicas)), POLICIES[policy], random.Random(seed)
    choose = route() if route else None
    held: list[dict[str, float]] = [{} for _ in replicas]
    pending: dict[str, tuple[Pending, float]] = {}
    order = itertools.count()
    arriving = iter(zip(jobs, due, strict=True))
    events: list[tuple[float, int, Job | int]] = []  # a job arrives, or a replica ends a step or begins one
    idle = set(range(len(replicas)))

    def more(count: int | None) -> Iterator[tuple[float, int, Job | int]]:
        for job, time in itertools.islice(arriving, count):
            yield (now + outside if in_flight else time), next(order), job

    now = 0.0
    for event in more(in_flight):
        heapq.heappush(events, event)
    while events:
        now, _, what = heapq.heappop(events)
        if isinstance(what, Job):
            one = Pending(what.id, b"", True, cost_of(what), steps_of(what), 0, what.id)
            if choose is None:
                dispatcher.add(one)
                ((to, _),) = dispatcher.assign(range(len(replicas)), more_to_come=False)
            else:
                to = choose(held, draw)
            pending[what.id] = one, now
            held[to][what.id] = one.cost
            replicas[to].add(what, now)
            if to in idle:
                idle.remove(to)
                heapq.heappush(events, (now, next(order), to))
        elif replicas[what].batch:
            for entry in replicas[what].end():
                one, arrived = pending.pop(entry.job.id)
                dispatcher.remove(one)
                held[what].pop(entry.job.id)
                outcome.answered.append((entry.job, now - arrived + outside, (entry.started_at or now) - arrived))
                for event in more(1) if in_flight else ():
                    heapq.heappush(events, event)
            heapq.heappush(events, (now, next(order), what))  # what comes at this moment is in its next step
        elif (seconds := replicas[what].begin(now)) is not None:
            heapq.heappush(events, (now + seconds, next(order), what))
        else:
            idle.add(what)
    outcome.seconds = now + outside
    return outcome

"""The simulation beside reality: the bundled pair on this CPU (`python -m benchmarks.simulate --validate http`).

The cost of a step is fitted to steps of the engine; then the real thing and the simulation get the same other requests
at the same times. Calibration and real runs take turns, since a machine is not always equally fast. The real thing is a
server that is asked over HTTP, or the engine alone, whose time passes only while it computes, by one of `CLOCKS`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np
import torch
from scipy.optimize import nnls

from benchmarks.flops import Decoder
from benchmarks.gpu.estimate import Canvas, work
from benchmarks.processes import served
from benchmarks.report import CaseResult, Figure, Row
from benchmarks.simulator import Load, Outcome, Replica, around, canvases, simulate
from clients.aio import AsyncClient
from clients.loadgen import load_client, percentile
from clients.options import Diffusion, Guidance
from demo import bundled_model_path, bundled_reward_models
from server.diffusion.schedule import Step
from server.types import Job, Message
from server.wire.config import RewardSource, WorkerConfig
from server.wire.messages import Failed, Finished
from server.worker import service
from server.worker.reveal import Decision
from server.worker.runner import Runner
from server.worker.trajectory import Trajectory

WITHIN = 0.15
ROUNDS = 3
SMALL = Load(((1, 0.5), (2, 0.3), (4, 0.2)), (12, 0.4, 4, 40), (24, 0.4, 12, 48))
Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"cpu": time.process_time, "wall": time.perf_counter}
"""Seconds of this process alone, and of the wall."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """A step of a pair on this machine: non-negative seconds for each of `features`."""

    dream: Decoder
    judge: Decoder
    vocab_size: int
    weights: tuple[float, ...] = ()

    def features(self, step: Sequence[Canvas], begun: Sequence[Job], ended: Sequence[Job]) -> list[float]:
        """What a step's time grows with: itself, its inner steps, its trajectories and rows, operations by phase, and
        what begins and ends with it."""
        inner = [canvas.gradient_steps for canvas in step]
        operations = [each for each, _ in work(self.dream, self.judge, self.vocab_size, step).values()]
        counts = [1, max(inner), len(step), sum(inner), sum(canvas.masked for canvas in step)]
        ends = [bool(begun), len(begun), bool(ended), len(ended)]
        return [*counts, *operations, *ends, *around(self.judge, begun, ended)]

    def __call__(self, step: Sequence[Canvas], begun: Sequence[Job], ended: Sequence[Job]) -> float:
        return float(np.dot(self.weights, self.features(step, begun, ended)))

    def fit(self, steps: Sequence[tuple[list[float], float]]) -> Fitted:
        """To features of steps that took so many seconds: least squares, weighted as if errors grew with their root."""
        rows, spent = np.array([row for row, _ in steps]), np.array([seconds for _, seconds in steps])
        scaled = rows / np.sqrt(spent)[:, None]
        size = scaled.max(axis=0) + (scaled.max(axis=0) == 0)
        found, _ = nnls(scaled / size, np.sqrt(spent))
        return replace(self, weights=tuple(found / size))


@contextmanager
def watched(runner: Runner, front: list[float]) -> Iterator[list[list[Canvas]]]:
    """The canvases of each step that the runner takes; `front` gets the share of what is revealed that is in front of
    the first masked position."""
    step, seen = runner.denoiser.step, list[list[Canvas]]()

    def noted(batch: Sequence[tuple[Trajectory, Step]]) -> list[Decision]:
        seen.append(canvases(batch))
        masks = [trajectory.masked for trajectory, _ in batch if not trajectory.masked.all()]
        front.extend(int(masked.argmax()) / int((~masked).sum()) for masked in masks)
        return step(batch)

    runner.denoiser.step = noted  # type: ignore[assignment, method-assign]
    yield seen
    runner.denoiser.step = step  # type: ignore[method-assign]


def real(
    runner: Runner, jobs: Sequence[Job], due: Sequence[float], clock: Clock, in_flight: int | None = None
) -> tuple[Outcome, list[tuple[float, list[Job], list[Job]]]]:
    """The engine under the load of `simulate`; and the seconds of each step, and the jobs that began and ended with
    it."""
    outcome, now, steps = Outcome(), 0.0, list[tuple[float, list[Job], list[Job]]]()
    arrived: dict[str, tuple[Job, float]] = {}
    begun: list[Job] = []
    runner.begin = lambda job_id: begun.append(arrived[job_id][0])
    waiting = list(zip(jobs, due, strict=True))[::-1]
    while waiting or runner.has_work:
        while waiting and (len(arrived) < in_flight if in_flight else waiting[-1][1] <= now):
            job, time_due = waiting.pop()
            arrived[job.id] = job, now if in_flight else time_due
            runner.add(job, now)
        if not runner.has_work:
            now = waiting[-1][1]
            continue
        started = clock()
        events = runner.step()
        spent = clock() - started
        now += spent
        if failed := [event for event in events if isinstance(event, Failed)]:
            raise RuntimeError(failed[0].message)
        ended = [arrived.pop(event.job_id) for event in events if isinstance(event, Finished)]
        outcome.answered += [(job, now - at, 0.0) for job, at in ended]
        steps.append((spent, begun.copy(), [job for job, _ in ended]))
        begun.clear()
    outcome.seconds = now
    return outcome, steps


async def over_http(
    client: AsyncClient, jobs: Sequence[Job], due: Sequence[float], in_flight: int | None, outside: list[float]
) -> Outcome:
    """A server under the load of `simulate`, as its client sees it; `outside` gets the seconds of each request that it
    spent outside the queue and the steps."""
    outcome, started = Outcome(), time.perf_counter()
    coming = iter(zip(jobs, due, strict=True))

    async def ask(job: Job, at: float) -> None:
        sampling, guidance = job.sampling, job.guidance
        answer = await client.chat(
            [{"role": "user", "content": job.conversation[0].content}],
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            best_of=sampling.best_of,
            n=sampling.n,
            ignore_eos=True,
            guidance=Guidance(guidance.method, gradient_steps=guidance.inner_steps or None),
            diffusion=Diffusion(job.diffusion.steps),
        )
        latency = time.perf_counter() - started - at
        outcome.answered.append((job, latency, 0.0))
        if answer.guidance is not None:
            outside.append(latency - (answer.guidance.queue_ms + answer.guidance.generation_ms) / 1000)

    async def by_turns() -> None:
        for job, _ in coming:
            await ask(job, time.perf_counter() - started)

    async def on_time(job: Job, at: float) -> None:
        await asyncio.sleep(started + at - time.perf_counter())
        await ask(job, at)

    await asyncio.gather(
        *([by_turns() for _ in range(in_flight)] if in_flight else [on_time(*each) for each in coming])
    )
    outcome.seconds = time.perf_counter() - started
    return outcome


async def validate(way: str, requests: int) -> CaseResult:
    """One closed loop and two open ones, each of so many requests in every round; `way` is `http`, or a clock of the
    engine alone."""
    path, *_ = bundled_reward_models().values()
    torch.set_num_threads(1)
    config = WorkerConfig(str(bundled_model_path()), (RewardSource("rm", str(path)),), device="cpu", threads=1)
    runner = service.load(config).runner
    model, judge = runner.loaded.model, runner.reward_models["rm"]
    fitted = Fitted(Decoder.of(model.shape), Decoder.of(judge.shape), model.vocab_size)
    clock = CLOCKS.get(way, time.perf_counter)

    def jobs(count: int, seed: int) -> list[Job]:
        found = []
        for job in SMALL.jobs(count, seed):
            said = (Message("user", " ".join(["word"] * len(job.prompt_ids))),)
            found.append(replace(job, prompt_ids=tuple(runner.loaded.tokenizer.render_chat(said)), conversation=said))
        return found

    steps: list[tuple[list[float], float]] = []
    front: list[float] = []
    outside: list[float] = []
    runs: dict[str, list[tuple[Outcome, list[Job], list[float], int | None]]] = {}
    arguments = ("--device", "cpu", "--threads", "1", "--reward-model", f"rm={path}")
    async with served(arguments) if way == "http" else nullcontext("") as url, load_client(url) as client:

        async def ask(jobs: Sequence[Job], due: Sequence[float], in_flight: int | None = None) -> Outcome:
            if url:
                return await over_http(client, jobs, due, in_flight, outside)
            return real(runner, jobs, due, clock, in_flight)[0]

        real(runner, jobs(16, 0), [0.0] * 16, clock, 8)
        for count in (16, 64):  # the first warms up
            warm = await ask(jobs(count, 0), [0.0] * count, 8)
        capacity = len(warm.answered) / warm.seconds
        outside.clear()
        await ask(jobs(16, 0), [0.0] * 16, 1)  # so that none waits for a step of another's
        beyond = fmean(outside or [0.0])
        for number in range(ROUNDS):
            for in_flight in (1, 2, 4, 8):
                with watched(runner, front) as seen:
                    asked = jobs(2 * in_flight + 4, 10 * number + in_flight)
                    _, took = real(runner, asked, [0.0] * len(asked), clock, in_flight)
                for step, (spent, begun, ended) in zip(seen, took, strict=True):
                    steps.append((fitted.features(step, begun, ended), spent))
            for name, part in (("8 in flight", None), ("half as many arrive", 0.5), ("80% arrive", 0.8)):
                asked, at_once = jobs(requests, 100 + number), None if part else 8
                due = SMALL.arrivals(part * capacity, requests, number) if part else [0.0] * requests
                runs.setdefault(name, []).append((await ask(asked, due, at_once), asked, due, at_once))
    fitted = fitted.fit(steps)
    rows: list[Row] = []
    figures: list[Figure] = []
    for name, each in runs.items():
        simulated = [
            simulate(asked, due, [Replica(fitted, runner.book.budget, fmean(front))], in_flight=at_once, outside=beyond)
            for _, asked, due, at_once in each
        ]
        ours, theirs = measures(simulated), measures([outcome for outcome, *_ in each])
        rows += [{"variant": f"{name}, real"} | theirs, {"variant": f"{name}, simulated"} | ours]
        for measure, value in theirs.items():
            figures.append(Figure(f"{name}: {measure}, error", abs(ours[measure] / value - 1), at_most=WITHIN))
    return CaseResult("validation", rows, figures)


def measures(outcomes: Sequence[Outcome]) -> Row:
    """What is compared, over all rounds."""
    latencies = [latency for outcome in outcomes for _, latency, _ in outcome.answered]
    rate = len(latencies) / sum(outcome.seconds for outcome in outcomes)
    return {"requests_per_s": rate, "latency_p50": percentile(latencies, 50), "latency_p99": percentile(latencies, 99)}

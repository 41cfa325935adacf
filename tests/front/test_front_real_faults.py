"""Two real workers on a golden checkpoint in float64, and requests that make them raise, run out of memory or die."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from server.front.engine import Engine
from server.methods import METHODS
from server.types import DiffusionParams, GuidanceParams, Job, Message, SamplingParams, WeightedReward
from server.wire.config import EngineConfig, WorkerConfig
from server.wire.messages import Event, Failed, Finished, Started
from tests.faults.faulty_worker import COMMAND, Fault

GOLDEN = Path(__file__).parents[1] / "golden" / "dream-tiny"
WORKER = WorkerConfig(
    str(GOLDEN / "dlm"),
    reward_models={"rm": str(GOLDEN / "rm")},
    dtype="float64",
    device="cpu",
    threads=1,
    data_parallel=2,
    heartbeat_seconds=0.2,
    log_level="CRITICAL",
)

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[Engine]:
    engine = Engine(EngineConfig(WORKER, worker_command=COMMAND))
    await engine.start()
    yield engine
    await engine.stop()


def make_job(name: str, number: int, seed: int | None = None) -> Job:
    method = [*METHODS][number % 5]
    return Job(
        name,
        prompt_ids=tuple(5 + (number * 7 + index) % 400 for index in range(4 + number % 3)),
        sampling=SamplingParams(10 + number % 5, seed=number if seed is None else seed),
        diffusion=DiffusionParams(10),
        guidance=GuidanceParams(method, () if method == "none" else (WeightedReward("rm"),), gradient_steps=2),
        conversation=(Message("user", "Hi"),),
    )


async def last_event(engine: Engine, job: Job) -> Event:
    events = [event async for event in engine.submit(job)]
    assert [isinstance(event, Finished | Failed) for event in events].count(True) == 1
    assert [type(event) for event in events].count(Started) <= 1
    return events[-1]


async def crowd(engine: Engine, name: str) -> list[Event]:
    return await asyncio.gather(*(last_event(engine, make_job(f"{name}-{number}", number)) for number in range(10)))


def tokens(event: Event) -> tuple[int, ...]:
    assert isinstance(event, Finished), event
    return event.result.trajectories[0].token_ids


async def until_all_ready(engine: Engine) -> None:
    async with asyncio.timeout(120):
        while not all(worker.ready for worker in engine.stats.workers):  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_the_worker_makes_no_difference_and_all_take_part(engine: Engine) -> None:
    together = await crowd(engine, "spread")
    alone = [await last_event(engine, replace(make_job("", number), id=f"alone-{number}")) for number in range(10)]
    assert [tokens(event) for event in together] == [tokens(event) for event in alone]
    steps = [replica.stats.denoising_steps for replica in engine._replicas]
    assert min(steps) > 0
    assert engine.stats.runner.denoising_steps == sum(steps)


async def test_poison_gets_a_503_and_its_neighbours_their_tokens(engine: Engine) -> None:
    undisturbed = await crowd(engine, "before")
    restarts = engine.stats.worker_restarts
    poison = asyncio.create_task(last_event(engine, make_job("poison", 4, Fault.DIE)))
    neighbours = await crowd(engine, "neighbour")
    last = await poison
    assert isinstance(last, Failed)
    assert last.kind == "unavailable"
    assert [tokens(event) for event in neighbours] == [tokens(event) for event in undisturbed]
    await until_all_ready(engine)
    assert engine.stats.worker_restarts == restarts + 2


async def test_both_workers_killed_under_load(engine: Engine) -> None:
    await until_all_ready(engine)
    undisturbed = await crowd(engine, "calm")
    running = asyncio.create_task(crowd(engine, "killed"))
    await asyncio.sleep(0.1)
    for pid in engine.worker_pids:
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
    assert [tokens(event) for event in await running] == [tokens(event) for event in undisturbed]
    assert engine.stats.jobs_in_flight == 0


@pytest.mark.parametrize(("fault", "kind"), [(Fault.RAISE, "internal"), (Fault.EXHAUST_MEMORY, "out_of_memory")])
async def test_an_error_in_one_batch_does_not_take_later_ones(engine: Engine, fault: Fault, kind: str) -> None:
    await until_all_ready(engine)
    undisturbed = await crowd(engine, f"{kind}-before")
    pids = engine.worker_pids
    bad = asyncio.create_task(last_event(engine, make_job(kind, 4, fault)))
    neighbours = await crowd(engine, f"{kind}-neighbour")
    last = await bad
    assert isinstance(last, Failed)
    assert last.kind == kind
    for neighbour, calm in zip(neighbours, undisturbed, strict=True):
        assert isinstance(neighbour, Failed) or tokens(neighbour) == tokens(calm)
    later = await crowd(engine, f"{kind}-later")
    assert [tokens(event) for event in later] == [tokens(event) for event in undisturbed]
    assert engine.worker_pids == pids

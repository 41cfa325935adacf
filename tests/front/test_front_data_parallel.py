"""Several workers behind one front, with workers that follow a script: real processes, real signals, no model."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from server.errors import ConfigurationError
from server.front.engine import Engine, JobStream
from server.types import Message
from server.wire.config import EngineConfig
from server.wire.messages import Finished, Progress, Started
from tests.front.scripted import (
    alive,
    answer,
    configured,
    failure,
    in_flight,
    job,
    kill_worker,
    pid_of,
    pids,
    restarts,
    running,
    scores,
    tokens,
    tokens_of,
    until,
)
from tests.front.scripted_worker import Do


def parallel(workers: int = 2, model: str = "scripted", **changes: object) -> EngineConfig:
    return configured(model, data_parallel=workers, **changes)


async def worker_of(stream: JobStream) -> int:
    """The process that runs a `Do.VARY` job: it shows its id as a token."""
    async for event in stream:
        if isinstance(event, Progress):
            return event.revealed[0][1]
    raise AssertionError


async def test_jobs_and_scores_are_spread_over_the_workers() -> None:
    async with running(parallel(3)) as engine:
        workers = set(pids(engine))
        assert len(workers) == 3
        streams = [engine.submit(job(f"vary-{n}", Do.VARY, steps=200, stream_tokens=True)) for n in range(6)]
        seen = [await worker_of(stream) for stream in streams]
        assert {pid: seen.count(pid) for pid in workers} == dict.fromkeys(workers, 2)
        found = await asyncio.gather(*(scores(engine, [((), "x" * n)]) for n in range(9)))
        assert found == [[float(n)] for n in range(9)]
        for stream in streams:
            await stream.aclose()
        assert in_flight(engine) == 0
        # Cancelled where they ran: every worker is idle again.
        await until(lambda: engine.stats.running == 0)
        assert [replica.ready for replica in engine.replicas] == [True] * 3


async def test_a_dead_workers_jobs_run_again_and_the_other_worker_goes_on() -> None:
    async with running(parallel()) as engine:
        streams = [engine.submit(job(f"job-{n}", steps=60, step_ms=10, seed=n, stream_tokens=True)) for n in range(8)]
        for stream in streams:
            assert isinstance(await anext(stream), Started)
        survivor = pid_of(engine, 1)
        await kill_worker(engine, 0)
        assert engine.ready
        late = engine.submit(job("late", seed=99))
        assert await asyncio.gather(*map(tokens, streams)) == [tokens_of(n, 60) for n in range(len(streams))]
        assert isinstance(await answer(late), Finished)
        assert pid_of(engine, 1) == survivor
        assert [replica.restarts for replica in engine.replicas] == [1, 0]
        assert restarts(engine) == 1


async def test_ready_while_one_worker_is_and_new_work_goes_there(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    async with running(parallel(model=f"hang-after:{flag}")) as engine:
        flag.touch()
        await kill_worker(engine, 0)
        assert engine.ready
        assert [replica.ready for replica in engine.replicas] == [False, True]
        for n in range(4):
            assert isinstance(await answer(engine.submit(job(f"job-{n}"))), Finished)
        await kill_worker(engine, 1)
        assert not engine.ready
        flag.unlink()
        waiting = engine.submit(job("waiting"))
        pid = pid_of(engine)
        os.kill(pid, signal.SIGKILL)  # it hangs while it loads
        assert isinstance(await answer(waiting), Finished)


async def test_a_worker_that_does_not_come_back_keeps_no_job(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    async with running(parallel(model=f"die-after:{flag}")) as engine:
        streams = [engine.submit(job(f"job-{n}", steps=40, step_ms=10, seed=n)) for n in range(4)]
        for stream in streams:
            assert isinstance(await anext(stream), Started)
        flag.touch()
        await kill_worker(engine, 0)
        assert await asyncio.gather(*map(tokens, streams)) == [tokens_of(n, 40) for n in range(len(streams))]
        assert engine.ready
        assert isinstance(await answer(engine.submit(job("next"))), Finished)


@pytest.mark.parametrize("workers", [1, 2])
async def test_poison_takes_no_neighbour_along(workers: int) -> None:
    async with running(parallel(workers)) as engine:
        streams = {n: engine.submit(job(f"job-{n}", steps=30, step_ms=5, seed=n)) for n in range(8)}
        poisons = [engine.submit(job(f"poison-{n}", Do.DIE)) for n in range(2)]
        await until(lambda: restarts(engine) > 0)
        streams |= {n: engine.submit(job(f"job-{n}", steps=5, seed=n)) for n in range(8, 12)}
        poisons.append(engine.submit(job("poison once more", Do.DIE)))  # as a client that retries
        assert {(await failure(stream)).kind for stream in poisons} == {"unavailable"}
        for n, stream in streams.items():
            assert await tokens(stream) == tokens_of(n, 30 if n < 8 else 5)
        assert restarts(engine) <= 12  # each at most four


async def test_all_workers_killed_at_once_and_one_spare() -> None:
    async with running(parallel(spare_worker=True)) as engine:
        streams = [engine.submit(job(f"job-{n}", steps=30, step_ms=5, seed=n)) for n in range(6)]
        scoring = [asyncio.create_task(scores(engine, [((Message("user", "hi"),), "four")])) for _ in range(4)]
        for stream in streams:
            assert isinstance(await anext(stream), Started)
        for pid in pids(engine):
            os.kill(pid, signal.SIGKILL)
        assert await asyncio.gather(*map(tokens, streams)) == [tokens_of(n, 30) for n in range(len(streams))]
        assert await asyncio.gather(*scoring) == [[4.0]] * 4
        await until(lambda: all(replica.ready for replica in engine.replicas))
        successors = pids(engine)
    assert not any(map(alive, successors))


@pytest.mark.parametrize("workers", [1, 2])
async def test_drain_waits_for_all_workers_even_if_one_dies(workers: int) -> None:
    async with running(parallel(workers)) as engine:
        readers = [asyncio.create_task(tokens(engine.submit(job(f"job-{n}", steps=20, step_ms=10)))) for n in range(4)]
        await asyncio.sleep(0)
        draining = asyncio.create_task(engine.drain(20.0))
        await kill_worker(engine, workers - 1)
        await draining
        assert await asyncio.gather(*readers) == [tokens_of(7, 20)] * 4


async def test_one_worker_that_cannot_start_ends_the_start_and_leaves_nothing() -> None:
    engine = Engine(parallel(3, model="missing-from:2"))
    with pytest.raises(ConfigurationError, match="worker 2"):
        await engine.start()
    started = pids(engine)
    assert len(started) < 3
    await engine.stop()
    assert not any(map(alive, started))
    assert not engine.ready

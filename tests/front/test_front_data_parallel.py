"""Several workers behind one front, with workers that follow a script: real processes, real signals, no model."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from server.errors import Draining
from server.front.engine import JobStream
from server.types import Message
from server.wire.messages import Finished, Progress, Started
from tests.front.scripted import alive, answer, configured, failure, job, running, tokens, tokens_of, until
from tests.front.scripted_worker import Do


async def worker_of(stream: JobStream) -> int:
    """The process that runs a `Do.VARY` job: it shows its id as a token."""
    async for event in stream:
        if isinstance(event, Progress):
            return event.revealed[0][1]
    raise AssertionError


async def test_jobs_and_scores_are_spread_over_the_workers() -> None:
    async with running(configured(data_parallel=3)) as engine:
        workers = set(engine.pids)
        assert len(workers) == 3
        streams = [engine.submit(job(f"vary-{n}", Do.VARY, steps=200, stream_tokens=True)) for n in range(6)]
        seen = [await worker_of(stream) for stream in streams]
        assert {pid: seen.count(pid) for pid in workers} == dict.fromkeys(workers, 2)
        found = await asyncio.gather(*(engine.scores([((), "x" * n)]) for n in range(9)))
        assert found == [[float(n)] for n in range(9)]
        for stream in streams:
            await stream.aclose()
        assert engine.in_flight == 0
        # Cancelled where they ran: every worker is idle again.
        await until(lambda: engine.stats.running == 0)
        assert [replica.ready for replica in engine.replicas] == [True] * 3


@pytest.mark.parametrize("comes_back", [True, False])
async def test_a_dead_workers_jobs_run_again_and_the_other_worker_goes_on(comes_back: bool, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    async with running(configured(f"die:{flag}", data_parallel=2)) as engine:
        streams = [
            await engine.begin(job(f"job-{n}", steps=60, step_ms=10, seed=n, stream_tokens=True)) for n in range(8)
        ]
        survivor = engine.pids[1]
        if not comes_back:
            flag.touch()
        await engine.kill(0)
        assert engine.ready
        late = engine.submit(job("late", seed=99))
        assert await asyncio.gather(*map(tokens, streams)) == [tokens_of(n, 60) for n in range(len(streams))]
        assert await tokens(late) == tokens_of(99, 4)
        assert engine.pids[-1] == survivor
        assert engine.replicas[1].restarts == 0
        assert (engine.restarts == 1) == comes_back


async def test_ready_while_one_worker_is_and_new_work_goes_there(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    async with running(configured(data_parallel=2, model=f"hang:{flag}")) as engine:
        flag.touch()
        await engine.kill(0)
        assert engine.ready
        assert [replica.ready for replica in engine.replicas] == [False, True]
        for n in range(4):
            assert isinstance(await engine.last(job(f"job-{n}")), Finished)
        await engine.kill(1)
        assert not engine.ready
        flag.unlink()
        waiting = engine.submit(job("waiting"))
        await engine.kill()  # it hangs while it loads
        assert isinstance(await answer(waiting), Finished)


@pytest.mark.parametrize("workers", [1, 2])
async def test_poison_takes_no_neighbour_along(workers: int) -> None:
    async with running(configured(data_parallel=workers)) as engine:
        streams = {n: engine.submit(job(f"job-{n}", steps=30, step_ms=5, seed=n)) for n in range(8)}
        poisons = [engine.submit(job(f"poison-{n}", Do.DIE)) for n in range(2)]
        await until(lambda: engine.restarts > 0)
        streams |= {n: engine.submit(job(f"job-{n}", steps=5, seed=n)) for n in range(8, 12)}
        poisons.append(engine.submit(job("poison once more", Do.DIE)))  # as a client that retries
        assert {(await failure(stream)).kind for stream in poisons} == {"worker_lost"}
        for n, stream in streams.items():
            assert await tokens(stream) == tokens_of(n, 30 if n < 8 else 5)
        assert engine.restarts <= 12  # each at most four


async def test_all_workers_killed_at_once_and_one_spare() -> None:
    async with running(configured(data_parallel=2, spare_worker=True)) as engine:
        streams = [engine.submit(job(f"job-{n}", steps=30, step_ms=5, seed=n)) for n in range(6)]
        scoring = [asyncio.create_task(engine.scores([((Message("user", "hi"),), "four")])) for _ in range(4)]
        for stream in streams:
            assert isinstance(await anext(stream), Started)
        for pid in engine.pids:
            os.kill(pid, signal.SIGKILL)
        assert await asyncio.gather(*map(tokens, streams)) == [tokens_of(n, 30) for n in range(len(streams))]
        assert await asyncio.gather(*scoring) == [[4.0]] * 4
        await until(lambda: all(replica.ready for replica in engine.replicas))
        successors = engine.pids
    assert not any(map(alive, successors))


@pytest.mark.parametrize("workers", [1, 2])
async def test_drain_waits_for_all_workers_even_if_one_dies(workers: int) -> None:
    async with running(configured(data_parallel=workers)) as engine:
        readers = [asyncio.create_task(tokens(engine.submit(job(f"job-{n}", steps=20, step_ms=10)))) for n in range(4)]
        await asyncio.sleep(0)
        draining = asyncio.create_task(engine.drain(20.0))
        await asyncio.sleep(0)
        assert not engine.ready
        with pytest.raises(Draining):
            engine.submit(job("late"))
        await engine.kill(workers - 1)
        await draining
        assert await asyncio.gather(*readers) == [tokens_of(7, 20)] * 4

"""The engine around a worker that dies, hangs, or does not start: real processes, real signals, no model.

What must hold: every accepted job gets exactly one answer, whatever happens to the worker.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from server.errors import ConfigurationError, DeadlineExceeded, Draining, EngineFailed, NotReady
from server.front.pending import Pending
from server.wire.messages import Canvas, Event, Failed, Finished, Progress, Started
from tests.front.scripted import (
    Driven,
    alive,
    answer,
    configured,
    failure,
    job,
    running,
    tokens,
    tokens_of,
    until,
)
from tests.front.scripted_worker import Do
from tests.support.serving import ROOT


async def test_a_killed_worker_is_replaced_and_nobody_notices(engine: Driven) -> None:
    stream = engine.submit(job("a", steps=40, step_ms=20, stream_tokens=True, stream_canvas=True))
    other = engine.submit(job("b", steps=40, step_ms=20, seed=8))
    events = []
    async for event in stream:
        events.append(event)
        if isinstance(event, Progress) and event.step == 10:
            await engine.kill()
            assert not engine.ready
    assert isinstance(events[-1], Finished)
    assert events[-1].result.trajectories[0].token_ids == tokens_of(7, 40)
    assert [type(event) for event in events].count(Started) == 1
    revealed = [pair for event in events if isinstance(event, Progress) for pair in event.revealed]
    assert revealed == [*enumerate(tokens_of(7, 40))]
    assert [event.step for event in events if isinstance(event, Canvas)] == list(range(40))
    assert await tokens(other) == tokens_of(8, 40)
    assert engine.ready
    assert engine.restarts == 1
    assert engine.stats.denoising_steps >= 80 + 11  # the dead worker's share is counted too


async def test_a_worker_killed_again_and_again_under_load_loses_no_job(engine: Driven) -> None:

    async def client(number: int) -> bool:
        steps = 5 + number % 20
        last = await engine.last(job(f"job-{number}", steps=steps, step_ms=4, seed=number))
        if isinstance(last, Failed):
            assert last.kind == "worker_lost"
            return False
        assert isinstance(last, Finished)
        assert last.result.trajectories[0].token_ids == tokens_of(number, steps)
        return True

    clients: list[asyncio.Task[bool]] = []
    for turn in range(6):
        news = [asyncio.create_task(client(20 * turn + index)) for index in range(20)]
        clients += news
        if turn % 2 == 0:  # the worker dies among jobs, some done and some not
            await until(lambda news=news: sum(task.done() for task in news) >= 5)
        elif turn == 1:  # it dies as soon as it is there, and once while it loads
            await until(lambda: engine.ready)
        await engine.kill()
    assert sum(await asyncio.gather(*clients)) >= 117  # each one lost takes two kills for itself
    await until(lambda: engine.ready)
    await tokens(engine.submit(job("after")))
    assert engine.restarts == 6
    assert engine.in_flight == 0


async def spare_of(engine: Driven) -> int:
    """The process that stands by, when it does."""
    spare = engine._spare
    assert spare is not None
    await until(lambda: spare._spawning is not None)
    assert spare._spawning is not None
    return (await spare._spawning).process.pid


async def test_a_spare_worker_takes_over_and_is_replaced() -> None:
    async with running(configured(spare_worker=True)) as engine:
        first_spare = await spare_of(engine)
        stream = engine.submit(job("a", steps=20, step_ms=10))
        await engine.kill()
        assert isinstance(await answer(stream), Finished)
        assert engine.pids[0] == first_spare
        second_spare = await spare_of(engine)
        assert second_spare != first_spare
        # A spare that died unnoticed is no worse than none.
        os.kill(second_spare, signal.SIGKILL)
        await until(lambda: not alive(second_spare))
        await engine.kill()
        assert isinstance(await engine.last(job("b")), Finished)
        assert engine.pids[0] != second_spare
        last_spare = await spare_of(engine)
    assert not alive(last_spare)


async def test_the_log_names_who_ran_apart_and_who_killed_twice(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "server.front.engine")
    async with running() as engine:
        innocent = engine.submit(job("innocent", steps=100, step_ms=10))
        await anext(innocent)  # it has begun
        assert isinstance(await engine.last(job("poison", Do.DIE)), Failed)
        assert isinstance(await answer(innocent), Finished)
        assert isinstance(await engine.last(job("after")), Finished)
    records = [record for record in caplog.records if record.name == "server.front.engine"]
    assert [record.getMessage() for record in records] == [
        "worker 0 had 2 requests; after its death 2 run apart from new ones",
        "request innocent runs apart on worker 0",
        "request poison runs apart on worker 0",
        "worker 0 had 1 requests; after its death 1 run apart from new ones",
        "request poison runs apart on worker 0",
        "worker 0 had 1 requests; after its death 0 run apart from new ones",
        "request poison ends without an answer",
    ]
    deaths = [vars(record) for record in records if record.levelno == logging.WARNING]
    assert [(death["had"], death["convicted"]) for death in deaths] == [
        (["innocent", "poison"], []),
        (["poison"], []),
        (["poison"], ["poison"]),
    ]


async def test_a_second_run_that_differs_is_an_error_not_a_spliced_text(engine: Driven) -> None:
    stream = engine.submit(job("a", Do.VARY, steps=40, step_ms=10, stream_tokens=True))
    async for event in stream:
        if isinstance(event, Progress) and event.step == 3:
            await engine.kill()
    assert isinstance(event, Failed)
    assert event.kind == "engine_failed"


async def test_a_bug_in_the_engine_itself_leaves_nobody_waiting(
    engine: Driven, monkeypatch: pytest.MonkeyPatch
) -> None:
    deliver = Pending.deliver

    def broken(pending: Pending, event: Event) -> bool:
        if pending.id == "bad":
            raise KeyError("a bug")
        return deliver(pending, event)

    monkeypatch.setattr(Pending, "deliver", broken)
    await failure(engine.submit(job("bad")))
    await until(lambda: engine.ready)
    assert isinstance(await engine.last(job("good")), Finished)


@pytest.mark.parametrize("do", [Do.HANG, Do.HANG_WITH_THE_LOCK])
async def test_the_watchdog_turns_a_hang_into_a_restart(do: Do) -> None:
    async with running(configured(watchdog_seconds=0.6)) as engine:
        assert (await failure(engine.submit(job("stuck", do)))).kind == "worker_lost"
        assert isinstance(await engine.last(job("next")), Finished)


async def test_the_watchdog_replaces_a_stopped_worker() -> None:
    async with running(configured(watchdog_seconds=0.6)) as engine:
        stream = await engine.begin(job("a", steps=20, step_ms=20))
        os.kill(engine.pids[0], signal.SIGSTOP)
        assert isinstance(await answer(stream), Finished)
        assert engine.restarts > 0


async def test_an_idle_worker_is_not_taken_for_a_hanging_one() -> None:
    async with running(configured(watchdog_seconds=1.5)) as engine:
        await asyncio.sleep(2.5)
        # Work that takes longer than the limit in all, in steps that do not, is no hang either.
        assert isinstance(await engine.last(job("long", steps=60, step_ms=40)), Finished)
        assert engine.restarts == 0


async def test_a_deadline_that_passes_while_there_is_no_worker(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    async with running(configured(f"hang:{flag}")) as engine:
        stream = await engine.begin(job("late", Do.HANG, deadline=time.time() + 2))
        flag.touch()
        await engine.kill()
        last = await failure(stream)
        assert (last.kind, last.param) == ("deadline", "timeout")
        with pytest.raises(DeadlineExceeded):
            await engine.score("length", [((), "four")], deadline=time.time())


async def test_stop_leaves_no_process_even_if_the_worker_hangs() -> None:
    async with running(configured(stop_grace_seconds=0.2)) as engine:
        stream = await engine.begin(job("stuck", Do.HANG))
        pid = engine.pids[0]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert isinstance(await answer(stream), Failed)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
async def test_the_worker_leaves_draining_to_its_parent(engine: Driven, name: str) -> None:
    stream = engine.submit(job("a", steps=20, step_ms=10))
    pid = engine.pids[0]
    assert os.getpgid(pid) != os.getpgid(0)  # a Ctrl-C in the terminal does not even reach it
    os.kill(pid, getattr(signal, name))
    assert isinstance(await answer(stream), Finished)
    assert engine.restarts == 0


async def keep_a_worker(model: str) -> None:
    """The life of a parent whose worker runs an endless step or, with `hang`, is still loading; says its process."""
    engine = Driven(configured(model))
    starting = asyncio.create_task(engine.start())
    if model != "hang":
        await starting
        await anext(engine.submit(job("stuck", Do.HANG)))
    await until(lambda: bool(engine.pids))
    print(engine.pids[0], flush=True)
    await asyncio.sleep(3600)


@pytest.mark.parametrize("model", ["scripted", "hang"])
async def test_a_worker_never_outlives_its_parent(model: str) -> None:
    """The parent is killed, not stopped."""
    code = f"import asyncio, {__name__} as here; asyncio.run(here.keep_a_worker({model!r}))"
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", code, cwd=ROOT, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    assert alive(pid)
    parent.kill()
    await parent.wait()
    await until(lambda: not alive(pid))


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"model": "missing"}, ConfigurationError, "no checkpoint of that name"),
        ({"model": "broken"}, EngineFailed, "a bug in the loader"),
        ({"model": "die"}, EngineFailed, "exit status 7"),
        ({"model": "hang", "start_limit_seconds": 1.0}, EngineFailed, "not ready within"),
        ({"model": "missing-from:2", "data_parallel": 3}, ConfigurationError, "worker 2"),
        ({"worker_command": ("/nonexistent/python",)}, EngineFailed, "cannot be started"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
async def test_a_failed_start_says_why_and_leaves_nothing(
    changes: dict[str, Any], error: type[Exception], text: str
) -> None:
    engine = Driven(configured(**changes))
    with pytest.raises(error, match=text):
        await engine.start()
    started = engine.pids
    assert len(started) < len(engine.replicas)
    await engine.stop()
    assert not any(map(alive, started))
    assert not engine.ready
    with pytest.raises(Draining):
        engine.submit(job("a"))


async def test_restarts_that_fail_back_off_and_refuse_work_until_one_succeeds(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    async with running(configured(f"die:{flag}")) as engine:
        stream = await engine.begin(job("a", steps=40, step_ms=20))
        flag.touch()
        await engine.kill()
        assert (await failure(stream)).kind == "unavailable"
        with pytest.raises(NotReady) as refused:
            engine.submit(job("b"))
        assert refused.value.retry_after is not None
        flag.unlink()
        await until(lambda: engine.ready)
        assert isinstance(await engine.last(job("b")), Finished)
        assert engine.restarts >= 2


def test_only_deaths_before_ready_slow_the_next_start_down() -> None:
    (replica,) = Driven(configured(backoff_seconds=0.5, max_backoff_seconds=3.0)).replicas
    for replica.failed_starts, wait in ((0, 0.0), (1, 0.5), (2, 1.0), (3, 2.0), (4, 3.0), (1000, 3.0)):
        assert replica.backoff_seconds == wait

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
from dataclasses import replace
from pathlib import Path

import pytest

from server.errors import (
    ConfigurationError,
    DeadlineExceeded,
    EngineFailed,
    NotReady,
)
from server.front.engine import Engine
from server.front.pending import Pending
from server.wire.messages import Canvas, Event, Failed, Finished, Progress, Started
from tests.front.scripted import (
    CONFIG,
    SCRIPT,
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
    tokens,
    tokens_of,
    until,
)
from tests.front.scripted_worker import Do


async def test_a_killed_worker_is_replaced_and_nobody_notices() -> None:
    async with running() as engine:
        stream = engine.submit(job("a", steps=40, step_ms=20, stream_tokens=True, stream_canvas=True))
        other = engine.submit(job("b", steps=40, step_ms=20, seed=8))
        events = []
        async for event in stream:
            events.append(event)
            if isinstance(event, Progress) and event.step == 10:
                await kill_worker(engine)
                assert not engine.ready
        assert isinstance(events[-1], Finished)
        assert events[-1].result.trajectories[0].token_ids == tokens_of(7, 40)
        assert [type(event) for event in events].count(Started) == 1
        progress = [event for event in events if isinstance(event, Progress)]
        assert [event.revealed for event in progress] == [
            [(position, token)] for position, token in enumerate(tokens_of(7, 40))
        ]
        assert [event.step for event in events if isinstance(event, Canvas)] == list(range(40))
        assert await tokens(other) == tokens_of(8, 40)
        assert engine.ready
        assert restarts(engine) == 1
        assert engine.stats.denoising_steps >= 80 + 11  # the dead worker's share is counted too


async def test_a_worker_killed_again_and_again_under_load_loses_no_job() -> None:
    async with running() as engine:

        async def client(number: int) -> bool:
            steps = 5 + number % 20
            last = await answer(engine.submit(job(f"job-{number}", steps=steps, step_ms=4, seed=number)))
            if isinstance(last, Failed):
                assert last.kind == "unavailable"
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
            await kill_worker(engine)
        assert sum(await asyncio.gather(*clients)) >= 117  # each one lost takes two kills for itself
        await until(lambda: engine.ready)
        await tokens(engine.submit(job("after")))
        assert restarts(engine) == 6
        assert in_flight(engine) == 0


async def spare_of(engine: Engine) -> int:
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
        await kill_worker(engine)
        assert isinstance(await answer(stream), Finished)
        assert pid_of(engine) == first_spare
        second_spare = await spare_of(engine)
        assert second_spare != first_spare
        # A spare that died unnoticed is no worse than none.
        os.kill(second_spare, signal.SIGKILL)
        await until(lambda: not alive(second_spare))
        await kill_worker(engine)
        assert isinstance(await answer(engine.submit(job("b"))), Finished)
        assert pid_of(engine) != second_spare
        last_spare = await spare_of(engine)
    assert not alive(last_spare)


async def test_the_log_names_who_ran_apart_and_who_killed_twice(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "server.front.engine")
    async with running() as engine:
        innocent = engine.submit(job("innocent", steps=100, step_ms=10))
        await anext(innocent)  # it has begun
        assert isinstance(await answer(engine.submit(job("poison", Do.DIE))), Failed)
        assert isinstance(await answer(innocent), Finished)
        assert isinstance(await answer(engine.submit(job("after"))), Finished)
    records = [record for record in caplog.records if record.name == "server.front.engine"]
    assert [record.getMessage() for record in records] == [
        "worker 0 had 2 requests; after its death 2 run apart from new ones",
        "request innocent runs apart on worker 0",
        "request poison runs apart on worker 0",
        "worker 0 had 1 requests; after its death 1 run apart from new ones",
        "request poison runs apart on worker 0",
        "worker 0 had 1 requests; after its death 0 run apart from new ones",
    ]
    deaths = [vars(record) for record in records if record.levelno == logging.WARNING]
    assert [(death["had"], death["convicted"]) for death in deaths] == [
        (["innocent", "poison"], []),
        (["poison"], []),
        (["poison"], ["poison"]),
    ]


async def test_a_second_run_that_differs_is_an_error_not_a_spliced_text() -> None:
    async with running() as engine:
        stream = engine.submit(job("a", Do.VARY, steps=40, step_ms=10, stream_tokens=True))
        last: Event | None = None
        async for event in stream:
            last = event
            if isinstance(event, Progress) and event.step == 3:
                await kill_worker(engine)
        assert isinstance(last, Failed)
        assert last.kind == "engine_failed"


async def test_a_lost_device_fails_its_batch_and_then_needs_a_new_worker() -> None:
    async with running() as engine:
        assert (await failure(engine.submit(job("bad", Do.LOSE_THE_DEVICE)))).kind == "internal"
        assert isinstance(await answer(engine.submit(job("good"))), Finished)
        assert restarts(engine) == 1


async def test_a_bug_in_the_engine_itself_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as engine:
        deliver = Pending.deliver

        def broken(pending: Pending, event: Event) -> bool:
            if pending.id == "bad":
                raise KeyError("a bug")
            return deliver(pending, event)

        monkeypatch.setattr(Pending, "deliver", broken)
        await failure(engine.submit(job("bad")))
        await until(lambda: engine.ready)
        assert isinstance(await answer(engine.submit(job("good"))), Finished)


@pytest.mark.parametrize("do", [Do.HANG, Do.HANG_WITH_THE_LOCK])
async def test_the_watchdog_turns_a_hang_into_a_restart(do: Do) -> None:
    async with running(configured(watchdog_seconds=0.6)) as engine:
        assert (await failure(engine.submit(job("stuck", do)))).kind == "unavailable"
        assert isinstance(await answer(engine.submit(job("next"))), Finished)


async def test_the_watchdog_replaces_a_stopped_worker() -> None:
    async with running(configured(watchdog_seconds=0.6)) as engine:
        stream = engine.submit(job("a", steps=20, step_ms=20))
        pid = pid_of(engine)
        assert isinstance(await anext(stream), Started)
        os.kill(pid, signal.SIGSTOP)
        assert isinstance(await answer(stream), Finished)
        assert pid_of(engine) != pid


async def test_an_idle_worker_is_not_taken_for_a_hanging_one() -> None:
    async with running(configured(watchdog_seconds=1.5)) as engine:
        pid = pid_of(engine)
        await asyncio.sleep(2.5)
        assert pid_of(engine) == pid
        # Work that takes longer than the limit in all, in steps that do not, is no hang either.
        assert isinstance(await answer(engine.submit(job("long", steps=60, step_ms=40))), Finished)
        assert pid_of(engine) == pid


async def test_a_deadline_that_passes_while_there_is_no_worker(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    async with running(configured(f"hang-after:{flag}")) as engine:
        stream = engine.submit(job("late", Do.HANG, deadline=time.time() + 0.5))
        assert isinstance(await anext(stream), Started)
        flag.touch()
        await kill_worker(engine)
        last = await failure(stream)
        assert (last.kind, last.param) == ("deadline", "timeout")
        with pytest.raises(DeadlineExceeded):
            await engine.score("length", [((), "four")], deadline=time.time())


async def test_stop_leaves_no_process_even_if_the_worker_hangs() -> None:
    engine = Engine(configured(stop_grace_seconds=0.2))
    await engine.start()
    stream = engine.submit(job("stuck", Do.HANG))
    assert isinstance(await anext(stream), Started)
    pid = pid_of(engine)
    await engine.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert isinstance(await answer(stream), Failed)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
async def test_the_worker_leaves_draining_to_its_parent(name: str) -> None:
    async with running() as engine:
        stream = engine.submit(job("a", steps=20, step_ms=10))
        pid = pid_of(engine)
        assert os.getpgid(pid) != os.getpgid(0)  # a Ctrl-C in the terminal does not even reach it
        os.kill(pid, getattr(signal, name))
        assert isinstance(await answer(stream), Finished)
        assert restarts(engine) == 0


@pytest.mark.parametrize("model", ["scripted", "hang"])
async def test_a_worker_never_outlives_its_parent(model: str) -> None:
    """The parent is killed, not stopped, while its worker runs an endless step or is still loading."""
    code = f"""
import asyncio, sys
sys.path.insert(0, {str(SCRIPT.parents[2])!r})
from server.wire.config import EngineConfig, WorkerConfig
from server.wire.messages import Configure, frame
from server.front.process import WorkerProcess
async def main():
    config = EngineConfig(WorkerConfig({model!r}, heartbeat_seconds=0.1), worker_command={CONFIG.worker_command!r})
    handle = await WorkerProcess.spawn(config.worker_command)
    handle.send(frame(Configure(config.worker)))
    await handle.receive()
    print(handle.process.pid, flush=True)
    await asyncio.sleep(3600)
asyncio.run(main())
"""
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    assert alive(pid)
    parent.kill()
    await parent.wait()
    await until(lambda: not alive(pid))


@pytest.mark.parametrize(
    ("model", "error", "text"),
    [
        ("missing", ConfigurationError, "no checkpoint of that name"),
        ("broken", EngineFailed, "a bug in the loader"),
        ("die", EngineFailed, "exit status 7"),
        ("hang", EngineFailed, "not ready within"),
    ],
)
async def test_a_failed_start_says_why_and_leaves_nothing(model: str, error: type[Exception], text: str) -> None:
    engine = Engine(configured(model, start_limit_seconds=20.0 if model != "hang" else 1.0))
    with pytest.raises(error, match=text):
        await engine.start()
    assert not pids(engine)
    assert not engine.ready
    with pytest.raises(NotReady):
        engine.submit(job("a"))
    await engine.stop()


async def test_a_command_that_does_not_exist() -> None:
    engine = Engine(configured(worker_command=("/nonexistent/python",)))
    with pytest.raises(EngineFailed, match="cannot be started"):
        await engine.start()


async def test_restarts_that_fail_back_off_and_refuse_work_until_one_succeeds(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    async with running(configured(f"die-after:{flag}")) as engine:
        stream = engine.submit(job("a", steps=40, step_ms=20))
        assert isinstance(await anext(stream), Started)
        flag.touch()
        await kill_worker(engine)
        assert (await failure(stream)).kind == "unavailable"
        with pytest.raises(NotReady) as refused:
            engine.submit(job("b"))
        assert refused.value.retry_after is not None
        flag.unlink()
        await until(lambda: engine.ready)
        assert isinstance(await answer(engine.submit(job("b"))), Finished)
        assert restarts(engine) >= 2


def test_only_deaths_before_ready_slow_the_next_start_down() -> None:
    (replica,) = Engine(replace(CONFIG, backoff_seconds=0.5, max_backoff_seconds=3.0)).replicas
    waits = []
    for replica.failed_starts in (0, 1, 2, 3, 4, 1000):
        waits.append(replica.backoff_seconds)
    assert waits == [0.0, 0.5, 1.0, 2.0, 3.0, 3.0]

"""Jobs that wait for outside scorers: what they ask, what they cost others, and what becomes of them when something
goes wrong meanwhile."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from server.errors import DeadlineExceeded, ScorerFailed, ScorerUnavailable
from server.front.engine import JobStream
from server.scorers.scorer import FAILURES_TO_OPEN
from server.types import GuidanceParams, Job, Message, WeightedReward
from server.wire.messages import Failed, Finished
from tests.front.scripted import answer, configured, failure, job, running, until
from tests.support.scorers import Stub, function, hanging, ok, outside, stub

ROOM = {"timeout_seconds": 120, "retries": 0}


def scored(name: str, *scorers: str, **fields: Any) -> Job:
    """A job of four steps that is judged after the second and at the end."""
    guidance = GuidanceParams(scorers=tuple(WeightedReward(each) for each in scorers))
    return job(name, guidance=guidance, conversation=(Message("user", "go"),), **fields)


def texts(made: Stub) -> list[str]:
    """What a server of the kind entrgi was asked about."""
    return [text for _, _, body in made.asked for text in body["documents"]]


def scores(_: str, body: Any) -> Any:
    """Of such a server: each text's length."""
    return ok({"data": [{"index": index, "score": len(text)} for index, text in enumerate(body["documents"])]})


async def rewards(stream: JobStream) -> dict[str, float | None]:
    last = await answer(stream)
    assert isinstance(last, Finished), last
    return last.result.trajectories[0].rewards


async def test_all_scorers_of_a_job_are_asked_and_the_others_are_not() -> None:
    with stub(scores) as used, stub(scores) as idle:
        http = [outside(name, f"entrgi+{each.url}", **ROOM) for name, each in (("far", used), ("idle", idle))]
        async with running(configured(scorers=(function("length", **ROOM), *http))) as engine:
            stream = engine.submit(scored("a", "length", "far", "loaded in the worker"), {"answer": 42})
            assert await rewards(stream) == {"length": 9.0, "far": 9.0}
    assert texts(used) == ["7 after 1", "7 after 3"]
    assert used.asked[0][2]["queries"] == [{"role": "user", "content": "go"}]
    assert used.asked[0][2]["metadata"] == {"answer": 42}
    assert not idle.asked


async def test_a_worker_that_dies_meanwhile_costs_no_second_question_and_no_suspicion() -> None:
    with stub(lambda path, body: made.released.wait() and scores(path, body)) as made:
        async with running(configured(scorers=(outside("far", f"entrgi+{made.url}", **ROOM),))) as engine:
            streams = [engine.submit(scored(name, "far", seed=seed)) for name, seed in (("a", 1), ("b", 2))]
            await until(lambda: engine.parked == 2)
            await engine.kill()
            assert engine.suspects == 0
            await until(lambda: engine.parked == 2)
            made.released.set()
            assert [await rewards(stream) for stream in streams] == [{"far": 9.0}] * 2
    assert sorted(texts(made)) == ["1 after 1", "1 after 3", "2 after 1", "2 after 3"]


async def test_the_deadline_ends_the_waiting_and_the_job_has_its_answer() -> None:
    with stub(lambda *asked: hanging(lambda: made)(*asked)) as made:
        async with running(configured(scorers=(outside("far", f"entrgi+{made.url}", **ROOM),))) as engine:
            stream = engine.submit(scored("a", "far", deadline=time.time() + 1))
            assert await rewards(stream) == {"far": None}
            with pytest.raises(DeadlineExceeded, match="while the request was scored"):
                await engine.score("far", [((), "text")], deadline=time.time() + 0.1)
            assert (engine.in_flight, engine.parked) == (0, 0)


async def test_a_scorer_that_fails_fails_its_own_jobs_alone() -> None:
    scorers = (function("scripted", **ROOM), function("length", **ROOM), outside("gone", "entrgi+http://127.0.0.1:9"))
    async with running(configured(scorers=scorers)) as engine:
        lost = [engine.submit(scored(name, "length", "gone")) for name in ("a", "b")]
        kept = [engine.submit(scored(name, "length")) for name in ("c", "d")]
        for stream in lost:
            failed = await failure(stream)
            assert (failed.kind, failed.error().status) == ("scorer_failed", 502)
            assert failed.message == "the scorer gone cannot be reached"
        assert [await rewards(stream) for stream in kept] == [{"length": 9.0}] * 2
        assert (await engine.score("scripted", [((), "abc")])).scores == [3.0]
        for text in ("die", "few", "raise"):
            with pytest.raises(ScorerFailed, match="the scorer scripted"):
                await engine.score("scripted", [((), text)])
        assert (engine.in_flight, engine.restarts) == (0, 0)


async def test_a_job_for_a_scorer_that_is_left_alone_is_refused_at_the_door() -> None:
    async with running(configured(scorers=(function("length", **ROOM),))) as engine:
        breaker = engine.scorers["length"].breaker
        for _ in range(FAILURES_TO_OPEN):
            breaker.heard(time.monotonic() + 3600, down=True)
        with pytest.raises(ScorerUnavailable, match="the scorer length"):
            engine.submit(scored("a", "length"))
        assert engine.in_flight == 0
        assert isinstance(await engine.last(job("other")), Finished)


async def test_who_leaves_is_asked_about_no_longer() -> None:
    with stub(lambda path, body: made.released.wait() and scores(path, body)) as made:
        limits = {**ROOM, "max_concurrency": 1}
        async with running(configured(scorers=(outside("far", f"entrgi+{made.url}", **limits),))) as engine:
            streams = [engine.submit(scored(name, "far", seed=seed)) for name, seed in (("a", 1), ("b", 2), ("c", 3))]
            await until(lambda: engine.parked == 3 and len(made.asked) == 1)
            (asked,) = texts(made)
            left = 1 if asked.startswith("2") else 2
            await streams[left - 1].aclose()
            made.released.set()
            assert [await rewards(each) for each in streams if each is not streams[left - 1]] == [{"far": 9.0}] * 2
    assert not any(text.startswith(str(left)) for text in texts(made))


async def test_parked_jobs_keep_their_places_and_end_with_the_drain() -> None:
    with stub(lambda *asked: hanging(lambda: made)(*asked)) as made:
        scorer = outside("far", f"entrgi+{made.url}", **ROOM)
        async with running(configured(scorers=(scorer,), max_queue=2)) as engine:
            streams = [engine.submit(scored("a", "far")), engine.submit(scored("b", "far"))]
            asking = asyncio.ensure_future(anext(streams[0]))
            await until(lambda: engine.parked == 2)
            with pytest.raises(Exception, match="the server takes 2"):
                engine.check_room()
            assert engine.ends_seconds() == []
            await engine.drain(0.1)
            await asking
            assert [event.kind for event in [await failure(each) for each in streams]] == ["draining"] * 2


async def test_others_go_on_while_jobs_are_parked() -> None:
    with stub(lambda *asked: hanging(lambda: made)(*asked)) as made:
        async with running(configured(scorers=(outside("far", f"entrgi+{made.url}", **ROOM),))) as busy:
            parked = [busy.submit(scored(f"p{index}", "far")) for index in range(8)]
            await until(lambda: busy.parked == 8)
            assert isinstance(await busy.last(job("other")), Finished)
            for stream in parked:
                await stream.aclose()
            assert busy.in_flight == 0


async def test_a_fault_of_ours_fails_the_request() -> None:
    """Nobody waits for ever, whatever happens to the asking."""
    async with running(configured(scorers=(function("length", **ROOM),))) as broken:
        stream = broken.submit(scored("a", "length"), {"not JSON": object()})
        last = await answer(stream)
        assert isinstance(last, Failed)
        assert last.kind == "engine_failed"

"""Scorers that are Python functions: whatever they do, their own requests get an answer, and the next ones too."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from server.errors import ConfigurationError, ScorerFailed
from server.scorers.calls import Pair
from server.scorers.scorer import Scorer
from server.types import Message
from server.wire.config import OutsideScorer
from server.wire.messages import MAX_FRAME_BYTES
from tests.front.scripted import alive, until
from tests.support.scorers import function, outside

ASKED = (Message("system", "be brief"), Message("user", "hello", "Ann"))


def pairs(*texts: str) -> list[Pair]:
    return [(ASKED, text) for text in texts]


@asynccontextmanager
async def started(settings: OutsideScorer) -> AsyncIterator[Scorer]:
    scorer = Scorer(settings)
    await scorer.start()
    try:
        yield scorer
    finally:
        await scorer.close()


@pytest.fixture
def patient() -> Callable[..., OutsideScorer]:
    """The scripted function with more time than a call can take on any machine."""
    return lambda **fields: function("scripted", timeout_seconds=120, **fields)


async def test_a_function_sees_conversations_and_metadata_and_may_print() -> None:
    async with started(function("scripted", timeout_seconds=120)) as scorer:
        assert await scorer.score(pairs("a", "abc"), None) == [1.0, 3.0]
        assert await scorer.score(pairs("turns", "x"), None) == [3008.0, 3008.0]
        assert await scorer.score(pairs("metadata"), {"answer": "\ud800"}) == [len('{"answer": "\\ud800"}')]
        assert await scorer.score(pairs("metadata"), None) == [len("null")]
        assert (scorer.stats.requests, scorer.stats.texts) == (4, 6)


async def test_what_texts_share_is_sent_once_and_a_call_is_bounded() -> None:
    known = {"x": "y" * 500_000}
    async with started(function("scripted", timeout_seconds=120)) as scorer:
        assert await scorer.score(pairs(*["a"] * 300), known) == [1.0] * 300  # 150 MB, if each had its own
        with pytest.raises(ScorerFailed, match=f"takes at most {MAX_FRAME_BYTES} bytes"):
            await scorer.score(pairs("a" * MAX_FRAME_BYTES), None)
        assert await scorer.score([*pairs("a"), ((), "turns"), *pairs("abc")], None) == [1.0, 5.0, 3.0]
        assert (scorer.stats.failures, scorer.breaker.failures) == ({"refused": 1}, 0)


@pytest.mark.parametrize(
    ("text", "reason", "words"),
    [
        ("die", "died", "ended its process"), ("raise me", "raised", "raised ValueError"),
        ("few", "answer", "2 finite numbers"), ("nan", "answer", "2 finite numbers"),
        ("inf", "answer", "2 finite numbers"), ("words", "raised", "raised ValueError"),
        ("nothing", "raised", "raised TypeError"),
    ],
)  # fmt: skip
async def test_what_a_function_does_wrong_fails_its_own_request_alone(
    text: str, reason: str, words: str, patient: Callable[..., OutsideScorer]
) -> None:
    async with started(patient()) as scorer:
        with pytest.raises(ScorerFailed) as caught:
            await scorer.score(pairs(text, "other"), None)
        assert words in caught.value.message
        assert "scripted" in caught.value.message
        assert "secret" not in caught.value.message
        assert scorer.stats.failures == {reason: 1}
        assert await scorer.score(pairs("abcd"), None) == [4.0]


async def test_a_function_that_hangs_is_killed_and_replaced() -> None:
    async with started(function("scripted", timeout_seconds=0.5)) as scorer:
        pid = None
        while pid is None:  # on a busy machine even this may take too long
            try:
                pid = int((await scorer.score(pairs("pid"), None))[0])
            except ScorerFailed:
                scorer.breaker.failures = 0
        with pytest.raises(ScorerFailed, match=r"did not answer within 0\.5 seconds"):
            await scorer.score(pairs("hang"), None)
        assert not alive(pid)


async def test_a_call_is_made_again_where_that_may_help(patient: Callable[..., OutsideScorer]) -> None:
    async with started(patient(retries=2)) as scorer:
        for text, retries in (("die", 2), ("nan", 4), ("raise", 4)):
            with pytest.raises(ScorerFailed):
                await scorer.score(pairs(text), None)
            assert scorer.stats.retries == retries


async def test_a_process_that_dies_between_two_calls_is_replaced(patient: Callable[..., OutsideScorer]) -> None:
    async with started(patient()) as scorer:
        pid = int((await scorer.score(pairs("pid"), None))[0])
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not alive(pid))
        assert await scorer.score(pairs("abcd"), None) == [4.0]


async def test_who_leaves_costs_the_others_no_process(tmp_path: Path, patient: Callable[..., OutsideScorer]) -> None:
    async with started(patient()) as scorer:
        before = await scorer.score(pairs("pid"), None)
        leaving = asyncio.ensure_future(scorer.score(pairs(f"wait {tmp_path / 'there'}"), None))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        staying = asyncio.ensure_future(scorer.score(pairs("pid"), None))
        (tmp_path / "there").touch()
        assert await staying == before


async def test_several_processes_where_several_calls_are_allowed(
    tmp_path: Path, patient: Callable[..., OutsideScorer]
) -> None:
    async with started(patient(max_concurrency=2)) as scorer:
        waiting = asyncio.ensure_future(scorer.score(pairs(f"wait {tmp_path / 'there'}"), None))
        await asyncio.sleep(0)
        with pytest.raises(ScorerFailed, match="ended its process"):
            await scorer.score(pairs("die"), None)
        (tmp_path / "there").touch()
        assert await waiting == [5.0 + len(str(tmp_path / "there"))]


async def test_no_process_outlives_its_server(patient: Callable[..., OutsideScorer]) -> None:
    async with started(patient(max_concurrency=2)) as scorer:
        pid = int((await scorer.score(pairs("pid"), None))[0])
        waiting = asyncio.ensure_future(scorer.score(pairs("hang"), None))
        await asyncio.sleep(0)
    assert not alive(pid)
    await asyncio.gather(waiting, return_exceptions=True)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("python:no.such.module:f", "ModuleNotFoundError: No module named 'no'"),
        ("python:tests.support.scorers:absent", "AttributeError"),
    ],
)
async def test_a_function_that_is_not_there_stops_the_start(target: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^scorers: mine: {words}"):
        await Scorer(outside("mine", target)).start()


async def test_a_process_ends_with_its_server_even_in_a_call(tmp_path: Path) -> None:
    """A server that is killed can end nothing itself."""
    program = (
        "import asyncio, sys; from server.scorers.scorer import Scorer; from tests.support.scorers import function\n"
        "async def main():\n"
        "    scorer = Scorer(function('scripted', max_concurrency=1)); await scorer.start()\n"
        "    print(int((await scorer.score([((), 'pid')], None))[0]), flush=True)\n"
        "    await scorer.score([((), 'hang')], None)\n"
        "asyncio.run(main())"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    pid = int(await process.stdout.readline())
    process.kill()
    await process.wait()
    await until(lambda: not alive(pid))

"""Scorers over HTTP: what they are sent and may answer, and what an answer cannot make the server do."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from server.errors import ConfigurationError, ScorerFailed, ScorerUnavailable
from server.scorers.scorer import FAILURES_TO_OPEN, OPEN_SECONDS, Breaker, Scorer
from server.scorers.servers import MAX_ANSWER_BYTES
from server.types import Message
from tests.front.scripted import until
from tests.support.scorers import PUBLISHED, Answer, Stub, hanging, ok, outside, stub

HELLO, BYE = (Message("user", "hello"),), (Message("system", "be brief"), Message("user", "bye"))
GOOD = {"data": [{"index": 1, "score": 2}, {"index": 0, "score": -1.5}]}
LABEL = {"vllm-classify": {"label": 1}}


@asynccontextmanager
async def asking(made: Stub, kind: str = "entrgi", **fields: Any) -> AsyncIterator[Scorer]:
    scorer = Scorer(outside("far", f"{kind}+{made.url}", **{"timeout_seconds": 120, **fields}))
    await scorer.start()
    try:
        yield scorer
    finally:
        await scorer.close()


async def failed(scorer: Scorer) -> str:
    with pytest.raises(ScorerFailed) as caught:
        await scorer.score([(HELLO, "a"), (HELLO, "b")], None)
    assert "127.0.0.1" not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("kind", PUBLISHED)
async def test_published_interfaces_are_kept_and_scores_come_in_order(kind: str) -> None:
    with stub(PUBLISHED[kind]) as made:
        async with asking(made, kind, **LABEL.get(kind, {})) as scorer:
            pairs = [(HELLO, "x" * (index % 7 + 1)) for index in range(70)] + [(BYE, "yes"), (HELLO, "no")]
            assert await scorer.score(pairs, {"not": "theirs"}) == [float(len(text)) for _, text in pairs]
    bodies = [body for _, _, body in made.asked]
    if kind == "tei-rerank":
        assert [len(body["texts"]) for body in bodies] == [32, 32, 6, 1, 1]
        assert bodies[3]["query"] == "system: be brief\nuser: bye"
        assert all(body["raw_scores"] for body in bodies)
    elif kind == "vllm-score":
        assert bodies[1]["text_1"] == [*["hello"] * 6, "system: be brief\nuser: bye", "hello"]


async def test_models_and_keys_are_those_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAR_KEY", "key-of-the-scorer")
    with stub(PUBLISHED["vllm-score"]) as made:
        async with asking(made, "vllm-score", model="judge", key_env="FAR_KEY") as scorer:
            await scorer.score([(HELLO, "a")], None)
        (_, headers, body), *_ = made.asked
        assert (headers["authorization"], body["model"]) == ("Bearer key-of-the-scorer", "judge")
        with pytest.raises(ConfigurationError, match="scorers: far: the environment has no ABSENT_KEY"):
            async with asking(made, "vllm-score", key_env="ABSENT_KEY"):
                pass


async def test_conversations_and_metadata_for_a_server_of_ours() -> None:
    with stub(lambda path, body: ok(GOOD)) as made:
        async with asking(made) as scorer:
            assert await scorer.score([(HELLO, "a"), (BYE, "b")], {"k": "v"}) == [-1.5, 2.0]
            assert await scorer.score([(HELLO, "a"), (HELLO, "b")], None) == [-1.5, 2.0]
    hello = [{"role": "user", "content": "hello"}]
    bye = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "bye"}]
    assert [(path, body) for path, _, body in made.asked] == [
        ("/v1/score", {"queries": [hello, bye], "documents": ["a", "b"], "metadata": {"k": "v"}}),
        ("/v1/score", {"queries": hello, "documents": ["a", "b"]}),
    ]


@pytest.mark.parametrize(
    "answer",
    [
        ok({"data": [{"index": 0, "score": 1.0}]}),
        ok({"data": [{"index": 0, "score": 1.0}] * 2}),
        ok({"data": [{"index": 0, "score": 1.0}, {"index": 2, "score": 1.0}]}),
        ok({"data": [{"index": index, "score": 1.0} for index in range(3)]}),
        ok({"data": [{"index": 0, "score": "1"}, {"index": 1, "score": 1.0}]}),
        ok({"data": [{"index": 0, "score": None}, {"index": 1, "score": 1.0}]}),
        (200, {}, b'{"data": [{"index": 0, "score": NaN}, {"index": 1, "score": 1}]}'),
        (200, {}, b'{"data": [{"index": 0, "score": 1e999}, {"index": 1, "score": 1}]}'),
        ok([1.0, 2.0]),
        (200, {}, b"<html>"),
        (200, {}, b""),
        (200, {"Content-Encoding": "gzip"}, gzip.compress(json.dumps(GOOD).encode())),
    ],
)
async def test_what_is_no_list_of_finite_numbers_is_no_answer(answer: Answer) -> None:
    with stub(lambda *_: answer) as made:
        async with asking(made, retries=1) as scorer:
            assert await failed(scorer) == "the scorer far did not answer with 2 finite numbers"
            assert (len(made.asked), scorer.stats.failures) == (2, {"answer": 2})


@pytest.mark.parametrize(("status", "calls"), [(500, 3), (503, 3), (429, 3), (400, 1), (401, 1), (404, 1), (204, 1)])
async def test_a_status_that_may_change_is_asked_for_again(status: int, calls: int) -> None:
    with stub(lambda *_: (status, {"Retry-After": "0"}, b"")) as made:
        async with asking(made, retries=2) as scorer:
            assert await failed(scorer) == f"the scorer far answered with status {status}"
    assert len(made.asked) == calls


async def test_an_answer_that_comes_at_last_is_taken() -> None:
    answers: Iterator[Answer] = iter([(500, {}, b""), (200, {}, b"{}"), ok(GOOD)])
    with stub(lambda *_: next(answers)) as made:
        async with asking(made, retries=2) as scorer:
            assert await scorer.score([(HELLO, "a"), (HELLO, "b")], None) == [-1.5, 2.0]
            assert (scorer.stats.retries, scorer.stats.failures) == (2, {"status": 1, "answer": 1})


async def test_redirects_are_not_followed() -> None:
    with stub(lambda *_: ok(GOOD)) as elsewhere, stub(lambda *_: (307, {"Location": elsewhere.url}, b"")) as made:
        async with asking(made) as scorer:
            assert await failed(scorer) == "the scorer far answered with status 307"
    assert not elsewhere.asked


async def test_an_answer_is_read_up_to_a_limit() -> None:
    with stub(lambda *_: (200, {}, b" " * (MAX_ANSWER_BYTES + 1))) as made:
        async with asking(made) as scorer:
            assert await failed(scorer) == f"the scorer far answered with more than {MAX_ANSWER_BYTES} bytes"


async def test_a_server_that_hangs_or_is_not_there() -> None:
    with stub(lambda *asked: hanging(lambda: made)(*asked)) as made:
        async with asking(made, timeout_seconds=0.1) as scorer:
            assert await failed(scorer) == "the scorer far did not answer within 0.1 seconds"
            assert scorer.stats.failures == {"timeout": 1}
    async with asking(made) as scorer:
        assert await failed(scorer) == "the scorer far cannot be reached"


async def test_a_scorer_that_is_down_is_left_alone_and_one_that_answers_is_not() -> None:
    with stub(lambda path, body: (400 if body["documents"] == ["bad"] else 500, {}, b"")) as made:
        async with asking(made) as scorer:
            for _ in range(2 * FAILURES_TO_OPEN):  # what is wrong with a request says nothing of the scorer
                with pytest.raises(ScorerFailed):
                    await scorer.score([(HELLO, "bad")], None)
            for _ in range(FAILURES_TO_OPEN):
                assert not scorer.breaker.open
                await failed(scorer)
            asked = len(made.asked)
            with pytest.raises(ScorerUnavailable) as caught:
                await scorer.score([(HELLO, "bad")], None)
            assert (caught.value.status, caught.value.retry_after) == (503, OPEN_SECONDS)
            assert (len(made.asked), scorer.stats.failures["open"]) == (asked, 1)


async def test_a_scorer_that_hangs_holds_nobody_up_for_longer_than_a_few_calls() -> None:
    with stub(lambda *asked: hanging(lambda: made)(*asked)) as made:
        async with asking(made, timeout_seconds=0.1, retries=2, max_concurrency=1) as scorer:
            requests = [scorer.score([(HELLO, str(number))], None) for number in range(20)]
            ended = await asyncio.gather(*requests, return_exceptions=True)
    assert {type(each) for each in ended} == {ScorerFailed, ScorerUnavailable}
    assert FAILURES_TO_OPEN <= len(made.asked) < 2 * FAILURES_TO_OPEN


async def test_a_request_that_has_failed_itself_says_why() -> None:
    """Though before its last call the scorer is left alone."""
    with stub(lambda *_: (500, {}, b"")) as made:
        async with asking(made, retries=FAILURES_TO_OPEN) as scorer:
            assert await failed(scorer) == "the scorer far answered with status 500"
            assert len(made.asked) == FAILURES_TO_OPEN


async def test_a_scorer_that_hangs_is_seen_though_nobody_waits_for_its_calls() -> None:
    with stub(lambda *asked: hanging(lambda: made)(*asked)) as made:
        async with asking(made, timeout_seconds=0.1) as scorer:
            for number in range(1, FAILURES_TO_OPEN + 1):
                leaving = asyncio.ensure_future(scorer.score([(HELLO, "a")], None))
                await asyncio.sleep(0)  # it has been asked
                leaving.cancel()
                await until(lambda number=number: scorer.stats.failures["timeout"] == number)
            assert scorer.breaker.open


async def test_a_scorer_that_is_there_again_answers_a_request_of_several_calls() -> None:
    answers = iter([(500, {}, b"")] * FAILURES_TO_OPEN)
    with stub(lambda path, body: next(answers, None) or PUBLISHED["tei-rerank"](path, body)) as made:
        async with asking(made, "tei-rerank") as scorer:
            for _ in range(FAILURES_TO_OPEN):
                await failed(scorer)
            assert scorer.breaker.open
            scorer.breaker = Breaker(FAILURES_TO_OPEN)  # its time is over
            assert await scorer.score([(HELLO, "abc")] * 40, None) == [3.0] * 40
            assert not scorer.breaker.open


def test_an_open_breaker_lets_one_try_and_closes_with_its_success() -> None:
    breaker = Breaker()
    for _ in range(FAILURES_TO_OPEN):
        assert breaker.lets(0.0)
        breaker.heard(0.0, down=True)
    assert not breaker.lets(OPEN_SECONDS - 1)
    assert breaker.lets(OPEN_SECONDS)
    assert not breaker.lets(OPEN_SECONDS + 1)  # while that one tries
    breaker.heard(OPEN_SECONDS + 2, down=True)
    assert not breaker.lets(2 * OPEN_SECONDS + 1)
    assert breaker.lets(2 * OPEN_SECONDS + 2)
    breaker.heard(3 * OPEN_SECONDS, down=False)
    assert breaker.lets(3 * OPEN_SECONDS)
    assert not breaker.open

"""Both clients over a transport that is a plain function: bodies, answers, errors, retries."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from email.utils import formatdate
from typing import Any

import httpx
import pytest

import clients
from clients import (
    ApiError,
    AsyncClient,
    BadRequest,
    Client,
    ConnectionFailed,
    Diffusion,
    Guidance,
    QueueFull,
    RetryPolicy,
    Summary,
    TextDelta,
    UnexpectedResponse,
    WeightedReward,
)

COMPLETION = {
    "id": "cmpl-1",
    "model": "demo",
    "choices": [{"index": 0, "text": "Lovely.", "finish_reason": "stop", "later": 1}],
    "added_later": {"ignored": True},
}

Handler = Callable[[httpx.Request], httpx.Response]


class Server:
    """Answers with what it was given, in turn (the last one for ever), and remembers what was asked."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    @property
    def body(self) -> Any:
        return json.loads(self.requests[-1].content)


def client(server: Handler, **options: Any) -> Client:
    return Client("http://server", transport=httpx.MockTransport(server), **options)


def envelope(status: int, headers: dict[str, str] | None = None) -> httpx.Response:
    error = {"message": "no", "type": "some_error", "param": "guidance.eta", "code": "invalid_value"}
    return httpx.Response(status, json={"error": error}, headers=headers)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Sleeps are noted, not slept."""
    noted: list[float] = []

    async def sleep(seconds: float) -> None:
        noted.append(seconds)

    monkeypatch.setattr(time, "sleep", noted.append)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    return noted


def test_only_the_given_fields_are_sent_and_what_a_later_server_adds_is_ignored() -> None:
    server = Server(httpx.Response(200, json=COMPLETION))
    assert client(server).complete("Hotel?").choices[0].text == "Lovely."
    assert server.body == {"prompt": "Hotel?"}
    client(server).complete(
        [1, 2],
        seed=7,
        suffix="!",
        guidance=Guidance("entrgi", reward_models=(WeightedReward("joy"), WeightedReward("brief", 0.5)), eta=0.0),
        diffusion=Diffusion(steps=8, deprioritize_eos=False),
        extra={"new_field": None, "other": 1},
    )
    assert server.requests[-1].url == "http://server/v1/completions"
    weighted = [{"model": "joy", "weight": 1.0}, {"model": "brief", "weight": 0.5}]
    steered = {"method": "entrgi", "reward_models": weighted, "eta": 0.0}
    sent = {"seed": 7, "suffix": "!", "guidance": steered, "diffusion": {"steps": 8, "deprioritize_eos": False}}
    assert server.body == {"prompt": [1, 2], **sent, "other": 1}


def test_the_key_is_a_bearer_token_or_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENTRGI_API_KEY", raising=False)
    server = Server(httpx.Response(200, json=COMPLETION))
    client(server).complete("a")
    assert "authorization" not in server.requests[-1].headers
    monkeypatch.setenv("ENTRGI_API_KEY", "from-environment,second-key")
    client(server).complete("a")
    assert server.requests[-1].headers["authorization"] == "Bearer from-environment"
    client(server, api_key="given").complete("a")
    assert server.requests[-1].headers["authorization"] == "Bearer given"


KINDS = {
    400: BadRequest, 401: clients.AuthenticationFailed, 404: clients.NotFound, 408: clients.DeadlineExceeded,
    413: clients.BodyTooLarge, 418: ApiError, 429: QueueFull, 500: clients.ServerFailed,
    502: clients.ScorerFailed, 503: clients.Unavailable,
}  # fmt: skip


@pytest.mark.parametrize(("status", "kind"), KINDS.items())
def test_errors_mirror_the_envelope(status: int, kind: type[ApiError]) -> None:
    server = Server(envelope(status, {"retry-after": "2", "x-request-id": "r-1"}))
    with pytest.raises(kind) as caught:
        client(server, retry=RetryPolicy(retries=0)).complete("a")
    error = caught.value
    assert type(error) is kind
    assert (error.status, error.type) == (status, "some_error")
    assert (error.param, error.code) == ("guidance.eta", "invalid_value")
    assert (error.retry_after, error.request_id) == (2.0, "r-1")
    assert "guidance.eta" in str(error)


def test_an_error_page_of_a_proxy_is_quoted_not_parsed() -> None:
    server = Server(httpx.Response(502, text="<h1>Bad gateway</h1>" + "x" * 10_000))
    with pytest.raises(ApiError, match="Bad gateway") as caught:
        client(server, retry=RetryPolicy(retries=0)).complete("a")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "answer", [b"<html>", b"[]", b'{"id": "a"}', b'{"id": 1, "model": "m", "choices": []}', b'"\xff"']
)
def test_an_answer_of_another_shape_is_unexpected(answer: bytes) -> None:
    with pytest.raises(UnexpectedResponse):
        client(Server(httpx.Response(200, content=answer))).complete("a")


def complete(server: Server, policy: RetryPolicy) -> Any:
    return client(server, retry=policy).complete("a")


def complete_async(server: Server, policy: RetryPolicy) -> Any:
    async def run() -> Any:
        async with AsyncClient("http://server", retry=policy, transport=httpx.MockTransport(server)) as asynchronous:
            return await asynchronous.complete("a")

    return asyncio.run(run())


def stream(server: Server, policy: RetryPolicy) -> Any:
    return list(client(server, retry=policy).stream_complete("a"))


def stream_async(server: Server, policy: RetryPolicy) -> Any:
    async def run() -> Any:
        async with AsyncClient("http://server", retry=policy, transport=httpx.MockTransport(server)) as asynchronous:
            return [event async for event in await asynchronous.stream_complete("a")]

    return asyncio.run(run())


both = pytest.mark.parametrize("call", [complete, complete_async])
Call = Callable[[Server, RetryPolicy], Any]


@both
def test_retry_waits_as_long_as_the_server_says(call: Call, waits: list[float]) -> None:
    server = Server(
        envelope(429, {"retry-after": "3"}),
        envelope(503, {"retry-after": formatdate(time.time() + 9, usegmt=True)}),
        httpx.Response(200, json=COMPLETION),
    )
    assert call(server, RetryPolicy(retries=2)).choices[0].text == "Lovely."
    assert waits[0] == 3.0
    assert 7.0 <= waits[1] <= 9.0


@both
def test_a_longer_wait_than_allowed_is_the_callers_business(call: Call, waits: list[float]) -> None:
    server = Server(envelope(429, {"retry-after": "31"}))
    with pytest.raises(QueueFull) as caught:
        call(server, RetryPolicy(max_wait_seconds=30.0))
    assert caught.value.retry_after == 31.0
    assert waits == []


@both
def test_without_word_from_the_server_the_wait_doubles_up_to_its_bound(call: Call, waits: list[float]) -> None:
    server = Server(httpx.ConnectError("refused"))
    with pytest.raises(ConnectionFailed, match="refused"):
        call(server, RetryPolicy(retries=5, first_wait_seconds=1.0, max_wait_seconds=5.0))
    assert len(server.requests) == 6
    for wait, full in zip(waits, [1.0, 2.0, 4.0, 5.0, 5.0], strict=True):
        assert 0.75 * full <= wait <= full


class Body(httpx.SyncByteStream, httpx.AsyncByteStream):
    """Some bytes, and then the connection breaks, if it does."""

    def __init__(self, start: bytes, breaks: bool = False) -> None:
        self.start, self.breaks, self.closed = start, breaks, False

    def __iter__(self) -> Iterator[bytes]:
        yield self.start
        if self.breaks:
            raise httpx.ReadError("broke off")

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self:
            yield part

    def close(self) -> None:
        self.closed = True

    async def aclose(self) -> None:
        self.closed = True


@pytest.mark.parametrize("call", [complete, complete_async, stream, stream_async])
@pytest.mark.parametrize("status", [200, 400])
@pytest.mark.parametrize(("start", "headers"), [(b"{", {}), (b"no gzip", {"content-encoding": "gzip"})])
def test_an_answer_that_breaks_off_or_cannot_be_unpacked_is_none(
    call: Call, status: int, start: bytes, headers: dict[str, str]
) -> None:
    body = Body(start, breaks=not headers)
    with pytest.raises(ConnectionFailed, match="decompressing" if headers else "broke off"):
        call(Server(httpx.Response(status, stream=body, headers=headers)), RetryPolicy(retries=0))
    assert body.closed


@both
@pytest.mark.parametrize(("status", "headers"), [(400, {}), (408, {"x-should-retry": "false"})])
def test_some_failures_are_final(call: Call, status: int, headers: dict[str, str], waits: list[float]) -> None:
    server = Server(envelope(status, headers))
    with pytest.raises(ApiError):
        call(server, RetryPolicy(retries=5))
    assert len(server.requests) == 1
    assert waits == []


def test_a_stream_asks_for_its_usage_and_knows_its_request() -> None:
    answer = b'data: {"choices":[{"index":0,"text":"Hi"}]}\n\ndata: [DONE]\n\n'
    server = Server(httpx.Response(200, content=answer, headers={"x-request-id": "r-2"}))
    with client(server).stream_complete("a", canvas=True, best_of=1) as stream:
        assert list(stream) == [TextDelta(0, "Hi"), Summary()]
        assert stream.request_id == "r-2"
    assert server.body["stream"] is True
    assert server.body["stream_canvas"] is True
    assert server.body["stream_options"] == {"include_usage": True}


def test_a_refused_stream_raises_before_any_event() -> None:
    with pytest.raises(BadRequest) as caught:
        client(Server(envelope(400))).stream_complete("a")
    assert caught.value.param == "guidance.eta"


async def test_both_clients_have_the_same_methods() -> None:
    def methods(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    assert methods(Client) == methods(AsyncClient)
    checked: Awaitable[Any] = AsyncClient("http://server").close()
    await checked

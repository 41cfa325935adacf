"""The synchronous client. `clients.aio` is the same with `await`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from types import TracebackType
from typing import Any, TypeVar, Unpack

import httpx

from . import calls
from .calls import Call
from .errors import ConnectionFailed
from .events import Event, StreamReader
from .options import Message, Options, Prompt, Queries, Query
from .retry import RetryPolicy
from .types import ChatCompletion, Completion, Model, Rerank, Scores, Tokenized

T = TypeVar("T")


class EventStream:
    """The events of one streamed request. Closing it early (leaving its `with`) tells the server to stop the work."""

    def __init__(self, response: httpx.Response) -> None:
        self.request_id = calls.request_id(response.headers)
        self._response = response
        self._reader = StreamReader(self.request_id)

    def __iter__(self) -> Iterator[Event]:
        try:
            for chunk in self._response.iter_bytes():
                yield from self._reader.feed(chunk)
                if self._reader.done:
                    return
            self._reader.close()
        except httpx.RequestError as error:
            raise ConnectionFailed(f"the stream broke: {error}") from error
        finally:
            self._response.close()

    def __enter__(self) -> EventStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Leave the stream."""
        self._response.close()


class Client:
    """A connection pool to one server.

    Args: `base_url` of the server; `api_key` (or ENTRGI_API_KEY); `retry` says how often to ask again; `timeout` is
    httpx's, for connecting and between two reads; `transport` replaces the network, in tests.

    Every method raises ApiError's subclasses for the server's errors, ConnectionFailed without an answer, and
    UnexpectedResponse for an answer of another shape.
    """

    def __init__(
        self,
        base_url: str = calls.DEFAULT_URL,
        *,
        api_key: str | None = None,
        retry: RetryPolicy | None = None,
        timeout: httpx.Timeout | float = calls.DEFAULT_TIMEOUT,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.retry = retry or RetryPolicy()
        self._http = httpx.Client(
            base_url=base_url, headers=calls.headers(api_key), timeout=timeout, transport=transport
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def complete(
        self,
        prompt: Prompt,
        *,
        suffix: str | None = None,
        chat_template: bool | None = None,
        **options: Unpack[Options],
    ) -> Completion:
        """Complete one or several raw prompts; with `suffix`, fill the gap between the two; with `chat_template`, each
        prompt is one user turn of a chat."""
        return self._send(calls.completion(prompt, options, suffix, chat_template))

    def chat(self, messages: Sequence[Message], **options: Unpack[Options]) -> ChatCompletion:
        """Answer a conversation."""
        return self._send(calls.chat(messages, options))

    def stream_complete(
        self,
        prompt: Prompt,
        *,
        suffix: str | None = None,
        chat_template: bool | None = None,
        canvas: bool = False,
        **options: Unpack[Options],
    ) -> EventStream:
        """`complete` as a stream of events; `canvas` adds the canvas after every denoising step."""
        return self._open(calls.streamed(calls.completion(prompt, options, suffix, chat_template), canvas=canvas))

    def stream_chat(
        self, messages: Sequence[Message], *, canvas: bool = False, **options: Unpack[Options]
    ) -> EventStream:
        """`chat` as a stream of events."""
        return self._open(calls.streamed(calls.chat(messages, options), canvas=canvas))

    def models(self) -> list[Model]:
        """What is served: diffusion models first, then reward models."""
        return self._send(calls.models())

    def score(self, queries: Queries, documents: str | Sequence[str], *, model: str | None = None) -> Scores:
        """The reward of each (query, document) pair: one query for all documents, or as many as documents."""
        return self._send(calls.score(queries, documents, model))

    def rerank(
        self, query: Query, documents: Sequence[str], *, model: str | None = None, top_n: int | None = None
    ) -> Rerank:
        """The documents by reward, best first."""
        return self._send(calls.rerank(query, documents, model, top_n))

    def tokenize(self, prompt: str, *, model: str | None = None) -> Tokenized:
        """The token ids of a raw prompt."""
        return self._send(calls.tokenize(prompt, model))

    def detokenize(self, tokens: Sequence[int], *, model: str | None = None) -> str:
        """The text of token ids."""
        return self._send(calls.detokenize(tokens, model))

    def _send(self, call: Call[T]) -> T:
        response = self._request(call, stream=False)
        return call.read(response.content)

    def _open(self, call: Call[Any]) -> EventStream:
        return EventStream(self._request(call, stream=True))

    def _request(self, call: Call[Any], *, stream: bool) -> httpx.Response:
        attempt = 0
        while True:
            try:
                response = self._http.send(
                    self._http.build_request(call.method, call.path, json=call.body), stream=stream
                )
                if response.status_code >= 400:
                    with closing(response):
                        response.read()
            except httpx.RequestError as error:
                wait = self.retry.wait(attempt, None, {})
                if wait is None:
                    raise ConnectionFailed(f"no answer from {self._http.base_url}: {error}") from error
            else:
                if response.status_code < 400:
                    return response
                wait = self.retry.wait(attempt, response.status_code, response.headers)
                if wait is None:
                    raise calls.error_of(response)
            time.sleep(wait)
            attempt += 1

"""The asynchronous client: `clients.client` with `await`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
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


class AsyncEventStream:
    """The events of one streamed request. Closing it early (leaving its `async with`) tells the server to stop."""

    def __init__(self, response: httpx.Response) -> None:
        self.request_id = calls.request_id(response.headers)
        self._response = response
        self._reader = StreamReader(self.request_id)

    async def __aiter__(self) -> AsyncIterator[Event]:
        try:
            async for chunk in self._response.aiter_bytes():
                for event in self._reader.feed(chunk):
                    yield event
                if self._reader.done:
                    return
            self._reader.close()
        except httpx.RequestError as error:
            raise ConnectionFailed(f"the stream broke: {error}") from error
        finally:
            await self._response.aclose()

    async def __aenter__(self) -> AsyncEventStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Leave the stream."""
        await self._response.aclose()


class AsyncClient:
    """A connection pool to one server; arguments and errors as for `clients.client.Client`."""

    def __init__(
        self,
        base_url: str = calls.DEFAULT_URL,
        *,
        api_key: str | None = None,
        retry: RetryPolicy | None = None,
        timeout: httpx.Timeout | float = calls.DEFAULT_TIMEOUT,
        limits: httpx.Limits | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.retry = retry or RetryPolicy()
        self._http = httpx.AsyncClient(
            base_url=base_url,
            headers=calls.headers(api_key),
            timeout=timeout,
            limits=limits or httpx.Limits(),
            transport=transport,
        )

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def complete(
        self,
        prompt: Prompt,
        *,
        suffix: str | None = None,
        chat_template: bool | None = None,
        **options: Unpack[Options],
    ) -> Completion:
        """Complete one or several raw prompts; with `suffix`, fill the gap between the two; with `chat_template`, each
        prompt is one user turn of a chat."""
        return await self._send(calls.completion(prompt, options, suffix, chat_template))

    async def chat(self, messages: Sequence[Message], **options: Unpack[Options]) -> ChatCompletion:
        """Answer a conversation."""
        return await self._send(calls.chat(messages, options))

    async def stream_complete(
        self,
        prompt: Prompt,
        *,
        suffix: str | None = None,
        chat_template: bool | None = None,
        canvas: bool = False,
        **options: Unpack[Options],
    ) -> AsyncEventStream:
        """`complete` as a stream of events; `canvas` adds the canvas after every denoising step."""
        call = calls.completion(prompt, options, suffix, chat_template)
        return await self._open(calls.streamed(call, canvas=canvas))

    async def stream_chat(
        self, messages: Sequence[Message], *, canvas: bool = False, **options: Unpack[Options]
    ) -> AsyncEventStream:
        """`chat` as a stream of events."""
        call = calls.chat(messages, options)
        return await self._open(calls.streamed(call, canvas=canvas))

    async def models(self) -> list[Model]:
        """What is served: diffusion models first, then reward models."""
        return await self._send(calls.models())

    async def score(self, queries: Queries, documents: str | Sequence[str], *, model: str | None = None) -> Scores:
        """The reward of each (query, document) pair: one query for all documents, or as many as documents."""
        return await self._send(calls.score(queries, documents, model))

    async def rerank(
        self, query: Query, documents: Sequence[str], *, model: str | None = None, top_n: int | None = None
    ) -> Rerank:
        """The documents by reward, best first."""
        return await self._send(calls.rerank(query, documents, model, top_n))

    async def tokenize(self, prompt: str, *, model: str | None = None) -> Tokenized:
        """The token ids of a raw prompt."""
        return await self._send(calls.tokenize(prompt, model))

    async def detokenize(self, tokens: Sequence[int], *, model: str | None = None) -> str:
        """The text of token ids."""
        return await self._send(calls.detokenize(tokens, model))

    async def _send(self, call: Call[T]) -> T:
        response = await self._request(call, stream=False)
        return call.read(response.content)

    async def _open(self, call: Call[Any]) -> AsyncEventStream:
        return AsyncEventStream(await self._request(call, stream=True))

    async def _request(self, call: Call[Any], *, stream: bool) -> httpx.Response:
        attempt = 0
        while True:
            try:
                response = await self._http.send(
                    self._http.build_request(call.method, call.path, json=call.body), stream=stream
                )
                if response.status_code >= 400:
                    async with aclosing(response):
                        await response.aread()
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
            await asyncio.sleep(wait)
            attempt += 1

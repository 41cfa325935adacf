"""The server's endpoints as values: what to send, and how to read the answer. Both clients send these."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import httpx

from .errors import ApiError, UnexpectedResponse, from_response
from .options import Message, Options, Prompt, Queries, Query, request_body
from .retry import retry_after
from .types import ChatCompletion, Completion, Model, Rerank, Scores, Tokenized, decode

T = TypeVar("T")

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT = httpx.Timeout(600.0, connect=5.0)


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request and the reader of its answer."""

    method: str
    path: str
    read: Callable[[bytes], T]
    body: dict[str, Any] | None = None


def completion(
    prompt: Prompt, options: Options, suffix: str | None = None, chat_template: bool | None = None
) -> Call[Completion]:
    """`POST /v1/completions`."""
    body = request_body(options, prompt=prompt, suffix=suffix, chat_template=chat_template)
    return Call("POST", "/v1/completions", lambda raw: decode(raw, Completion), body)


def chat(messages: Sequence[Message], options: Options) -> Call[ChatCompletion]:
    """`POST /v1/chat/completions`."""
    body = request_body(options, messages=messages)
    return Call("POST", "/v1/chat/completions", lambda raw: decode(raw, ChatCompletion), body)


def streamed(call: Call[T], *, canvas: bool) -> Call[T]:
    """The same request as a stream, with usage at its end and the canvas after every step if wanted."""
    body = {**(call.body or {}), "stream": True, "stream_options": {"include_usage": True}}
    if canvas:
        body["stream_canvas"] = True
    return Call(call.method, call.path, call.read, body)


def models() -> Call[list[Model]]:
    """`GET /v1/models`."""

    def read(raw: bytes) -> list[Model]:
        entries = decode(raw, dict[str, Any]).get("data")
        if not isinstance(entries, list) or not all(isinstance(e, dict) and "id" in e for e in entries):
            raise UnexpectedResponse("not a list of models")
        return [Model(str(entry["id"]), entry) for entry in entries]

    return Call("GET", "/v1/models", read)


def score(queries: Queries, documents: str | Sequence[str], model: str | None) -> Call[Scores]:
    """`POST /v1/score`."""
    body = request_body({}, model=model, queries=queries, documents=documents)
    return Call("POST", "/v1/score", lambda raw: decode(raw, Scores), body)


def rerank(query: Query, documents: Sequence[str], model: str | None, top_n: int | None) -> Call[Rerank]:
    """`POST /v1/rerank`."""
    body = request_body({}, model=model, query=query, documents=documents, top_n=top_n)
    return Call("POST", "/v1/rerank", lambda raw: decode(raw, Rerank), body)


def tokenize(prompt: str, model: str | None) -> Call[Tokenized]:
    """`POST /tokenize`."""
    return Call("POST", "/tokenize", lambda raw: decode(raw, Tokenized), request_body({}, model=model, prompt=prompt))


def detokenize(tokens: Sequence[int], model: str | None) -> Call[str]:
    """`POST /detokenize`."""

    def read(raw: bytes) -> str:
        text = decode(raw, dict[str, Any]).get("prompt")
        if not isinstance(text, str):
            raise UnexpectedResponse("no text in the answer")
        return text

    return Call("POST", "/detokenize", read, request_body({}, model=model, tokens=tokens))


def headers(api_key: str | None) -> dict[str, str]:
    """The headers of every request. Without a key it is ENTRGI_API_KEY, the server's own variable, which may list
    several, separated by commas: the first."""
    key = api_key or os.environ.get("ENTRGI_API_KEY", "").split(",")[0].strip()
    return {"authorization": f"Bearer {key}"} if key else {}


def error_of(response: httpx.Response) -> ApiError:
    """The exception for a response of status >= 400 whose body has been read."""
    return from_response(
        response.status_code,
        response.content,
        retry_after=retry_after(response.headers),
        request_id=request_id(response.headers),
    )


def request_id(response_headers: Mapping[str, str]) -> str | None:
    """The server's id of the request, for its logs."""
    return response_headers.get("x-request-id")

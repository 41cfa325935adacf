"""Routes that take a JSON body: reading it strictly (Python's parser alone takes NaN and repeated keys), and noticing
that the client has gone while it is answered."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Protocol, TypeVar

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Receive

from server.api import openapi
from server.api.answers import Answer
from server.api.errors import validate
from server.api.frontend import Frontend
from server.api.rules import Served
from server.errors import ClientGone, InvalidRequest, UnsupportedMediaType, quote

Model = TypeVar("Model", bound=BaseModel)
Result = TypeVar("Result")
Handler = Callable[[Frontend, Model], Coroutine[None, None, Response | Answer]]

SMALL_BYTES = 32_768  # what is larger would hold up the event loop
MAX_KEYS = 1024  # of one object; no request has more fields, and every unknown one costs an error
STATUSES = (400, 404, 408, 413, 415, 429, 503)


class Reader(Protocol):
    """What reading a body needs of an application: what its server takes, and where long work is done."""

    @property
    def served(self) -> Served | None: ...

    async def aside(self, work: Callable[[], Result]) -> Result: ...


def posts(
    router: APIRouter,
    paths: Sequence[str],
    schema: type[Model],
    answer: type[BaseModel],
    description: str,
    chunk: type[BaseModel] | None = None,
) -> Callable[[Handler[Model]], Handler[Model]]:
    """Register a handler of the body `schema` on some paths, which is cancelled when the client goes. Its answer, and
    the chunks of its stream if it has one, are for the OpenAPI document."""

    statuses = (*STATUSES, 502) if "metadata" in schema.model_fields else STATUSES  # outside scorers are given it

    def register(handler: Handler[Model]) -> Handler[Model]:
        async def endpoint(request: Request) -> Response:
            frontend: Frontend = request.app.state.frontend
            asked = await read(request, frontend, schema)
            answered = await unless_disconnected(request.receive, handler(frontend, asked))
            return JSONResponse(answered.to_json()) if isinstance(answered, Answer) else answered

        for path in paths:
            router.post(
                path,
                name=handler.__name__,
                description=handler.__doc__,
                responses=openapi.success(answer, description, chunk) | openapi.errors(*statuses),
                openapi_extra=openapi.body(schema),
            )(endpoint)
        return handler

    return register


async def unless_disconnected(receive: Receive, work: Coroutine[None, None, Result]) -> Result:
    """The result of `work`, which is cancelled when the client goes first (then ClientGone). The request's body must
    have been read. Whatever middleware lies between, `http.disconnect` tells."""
    working = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone("the client closed the connection")
    finally:
        gone.cancel()
        working.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def read(request: Request, reader: Reader, schema: type[Model]) -> Model:
    """The request's body as `schema`. Raises UnsupportedMediaType, InvalidRequest, UnknownModel, ClientGone, and
    `BodyTooLarge` from below."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise UnsupportedMediaType(f"the body must be application/json, not {quote(content_type)}")
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        raise UnsupportedMediaType(f"the body must not be compressed (content-encoding {quote(coding)})")
    try:
        data = await request.body()
    except ClientDisconnect:
        raise ClientGone("the client closed the connection") from None
    if len(data) <= SMALL_BYTES:
        return validate(schema, parse(data), reader.served)
    return await reader.aside(lambda: validate(schema, parse(data), reader.served))


def parse(body: bytes) -> object:
    """The JSON value. Raises InvalidRequest."""
    try:
        return json.loads(
            body.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique, parse_int=_parse_int
        )
    except UnicodeDecodeError:
        raise InvalidRequest("the body is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not JSON: {error.msg} at line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None


def _refuse_constant(name: str) -> object:
    raise InvalidRequest(f"{name} is not JSON")


def _parse_int(digits: str) -> int:
    # Python itself refuses very long ones with an error that is no JSONDecodeError.
    if len(digits) > 400:
        raise InvalidRequest(f"the number {quote(digits)} is too long")
    return int(digits)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(pairs) > MAX_KEYS:
        raise InvalidRequest(f"an object has more than {MAX_KEYS} keys")
    result = dict(pairs)
    if len(result) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise InvalidRequest(f"the key {quote(twice)} occurs twice in one object")
    return result

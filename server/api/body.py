"""Routes that take a JSON body, and reading it strictly: Python's parser alone takes NaN and repeated keys."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from server.api import openapi
from server.api.errors import validate
from server.api.frontend import Frontend
from server.errors import ClientGone, InvalidRequest, UnsupportedMediaType, quote

Model = TypeVar("Model", bound=BaseModel)
Handler = Callable[[Request, Frontend, Model], Awaitable[Response]]

SMALL_BYTES = 32_768  # what is larger would hold up the event loop
MAX_KEYS = 1024  # of one object; no request has more fields, and every unknown one costs an error


STATUSES = (400, 404, 408, 413, 415, 429, 503)


def posts(
    router: APIRouter,
    paths: Sequence[str],
    schema: type[Model],
    answer: type[BaseModel],
    description: str,
    chunk: type[BaseModel] | None = None,
) -> Callable[[Handler[Model]], Handler[Model]]:
    """Register a handler of the body `schema` on some paths; its answer, and the chunks of its stream if it has one,
    are for the OpenAPI document."""

    def register(handler: Handler[Model]) -> Handler[Model]:
        async def endpoint(request: Request) -> Response:
            frontend: Frontend = request.app.state.frontend
            return await handler(request, frontend, await read(request, schema))

        for path in paths:
            router.post(
                path,
                name=handler.__name__,
                description=handler.__doc__,
                responses=openapi.success(answer, description, chunk) | openapi.errors(*STATUSES),
                openapi_extra=openapi.body(schema),
            )(endpoint)
        return handler

    return register


async def read(request: Request, schema: type[Model]) -> Model:
    """The request's body as `schema`. Raises UnsupportedMediaType, InvalidRequest, UnknownModel, ClientGone, and what
    `LimitBody` raises from below."""
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
    frontend: Frontend = request.app.state.frontend
    if len(data) <= SMALL_BYTES:
        return validate(schema, parse(data), frontend.served)
    return await frontend.aside(lambda: validate(schema, parse(data), frontend.served))


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
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise InvalidRequest(f"the key {quote(key)} occurs twice in one object")
            seen.add(key)
    return result

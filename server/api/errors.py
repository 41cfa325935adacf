"""The one place where a failure becomes a response: OpenAI's envelope, on every path."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from server.api.rules import Served
from server.api.unsupported import UNSUPPORTED
from server.errors import (
    EngineFailed,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    RequestError,
    Unauthorized,
    quote,
)
from server.log import note

logger = logging.getLogger(__name__)

PARAM_CHARACTERS = 200
Model = TypeVar("Model", bound=BaseModel)


class ErrorBody(BaseModel):
    """What went wrong, in OpenAI's fields."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    message: str
    """What is wrong, and what would be right"""
    type: str
    """The kind of error, in OpenAI's words"""
    param: str | None
    """The path of the field that is wrong, as `guidance.eta`"""
    code: str | None
    """A word for programs"""


class ErrorEnvelope(BaseModel):
    """The body of every response that is not a success."""

    error: ErrorBody


def envelope(error: RequestError) -> dict[str, dict[str, str | None]]:
    """The error as JSON-ready data. The message always names the field."""
    message = error.message
    if error.param is not None and f"`{error.param}`" not in message:
        message = f"`{error.param}`: {message}"
    return {"error": {"message": message, "type": error.type, "param": error.param, "code": error.code}}


def headers(error: RequestError) -> dict[str, str]:
    """What the error adds to the response's header."""
    added: dict[str, str] = {}
    if error.retry_after is not None:
        added["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if not error.retryable:
        added["x-should-retry"] = "false"
    if isinstance(error, Unauthorized):
        added["WWW-Authenticate"] = 'Bearer realm="entrgi"'
    return added


def error_response(error: RequestError, extra_headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The response for an error, which the access line names."""
    note(error_code=error.code)
    return JSONResponse(envelope(error), error.status, headers={**headers(error), **(extra_headers or {})})


def unexpected(error: Exception) -> EngineFailed:
    """A bug of ours: logged with its traceback, told without."""
    logger.error("unexpected %s", type(error).__name__, exc_info=error)
    return EngineFailed("an internal error ended this request")


def install(app: Starlette) -> None:
    """Register the translation for everything that a route or the router raises."""

    async def ours(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        if request.method == "POST":  # a probe of /ready is no refused request
            request.app.state.frontend.metrics.refused(error)
        return error_response(error)

    async def router(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        extra = dict(error.headers or {})
        if extra.get("Allow") == "GET":
            extra["Allow"] = "GET, HEAD"  # every GET route has one beside it
        path = quote(request.url.path)
        if error.status_code == 404:
            return error_response(NotFound(f"there is no route {path}"), extra)
        if error.status_code == 405:
            return error_response(MethodNotAllowed(f"{path} does not take {quote(request.method)}"), extra)
        return error_response(unexpected(error), extra)

    app.add_exception_handler(RequestError, ours)
    app.add_exception_handler(HTTPException, router)


def explain(detail: Any) -> InvalidRequest:
    """One of pydantic's complaints, as ours."""
    location = detail["loc"]
    param = _clean(".".join(str(part) for part in location)) or None
    field = str(location[-1]) if location else ""
    where = f"`{param}`" if param else "the request body"
    kind = detail["type"]
    if kind == "extra_forbidden":
        return InvalidRequest(f"{where} is not a field of this request", param)
    if kind == "missing":
        return InvalidRequest(f"{where} is required", param)
    if field in UNSUPPORTED:
        return InvalidRequest(f"{where} is not supported: {UNSUPPORTED[field]}", param)
    message = str(detail["msg"])
    if kind == "invalid":
        return InvalidRequest(f"{where} {message}", param)
    value = detail.get("input")
    shown = ""
    if isinstance(value, str | int | float | None):
        shown = f" (got {json.dumps(value) if value is None or isinstance(value, bool) else quote(value)})"
    return InvalidRequest(f"{where} {_in_our_words(message)}{shown}", param)


def validate(schema: type[Model], data: object, served: Served | None = None) -> Model:
    """`data` as `schema`, within what this server takes where that is known. Raises InvalidRequest that names the
    first wrong field, and UnknownModel."""
    try:
        return schema.model_validate(data, context=served)
    except ValidationError as error:
        raise explain(error.errors(include_url=False, include_context=False)[0]) from None


def _clean(text: str) -> str:
    """A field path as it may stand in an answer: printable ASCII, at most 200 characters."""
    text = text[: PARAM_CHARACTERS + 1].encode("ascii", "backslashreplace").decode("ascii")
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= PARAM_CHARACTERS else text[: PARAM_CHARACTERS - 3] + "..."


_WORDS = tuple(
    (re.compile(pattern), word)
    for pattern, word in (
        (r"^(Input|List|String|Value|Dictionary|Set|Tuple) should ", "must "),
        (r"a valid dictionary( or instance of \w+)?", "an object"),
        (r"a valid (list|string|number)", r"a \1"),
        (r"a valid integer", "an integer"),
        (r"a valid boolean", "true or false"),
        (r" after validation", ""),
        (r"\bNone\b", "null"),
        (r"\bTrue\b", "true"),
        (r"\bFalse\b", "false"),
    )
)


def _in_our_words(message: str) -> str:
    """pydantic's sentence, which speaks of Python, as the end of one that begins with the field and speaks of JSON."""
    for pattern, word in _WORDS:
        message = pattern.sub(word, message)
    return message if message.startswith("must ") else f"is not valid: {message}"

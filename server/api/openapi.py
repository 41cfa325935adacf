"""The OpenAPI document, made to be true: bodies that routes read by themselves, every status they answer, streams,
headers, who needs a key, and, once the models are loaded, what they can take (`rules.Within`)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.api.errors import ErrorEnvelope
from server.api.examples import EXAMPLES
from server.api.frontend import Frontend
from server.api.middleware import ALWAYS_OPEN
from server.api.rules import DOCUMENTED, Served
from server.api.unsupported import UNSUPPORTED, WITHOUT_EFFECT

STATUSES = {
    400: "A field is wrong; `param` is its path",
    401: "No valid API key",
    404: "No such model or route",
    408: "The deadline passed before the work began",
    413: "The body is too large",
    415: "The body is not JSON",
    429: "The queue is full; see Retry-After",
    431: "The header is too large",
    500: "The server's own fault",
    502: "An outside scorer failed; the message names it",
    503: "Not ready, shutting down, or too many connections; see Retry-After",
}
Document = dict[str, Any]
_REFERENCE = "#/components/schemas/{model}"
_TOLD_OF_REQUESTS = {name: f"Only values that ask for nothing: {reason}" for name, reason in UNSUPPORTED.items()}
_TOLD_OF_REQUESTS |= dict.fromkeys(WITHOUT_EFFECT, "Accepted without effect")
_ECHOED = (
    "instructions max_output_tokens metadata temperature top_p user store background previous_response_id "
    "parallel_tool_calls tool_choice tools truncation"
)
_TIMES = (
    "created created_at expires_at in_progress_at finalizing_at completed_at failed_at expired_at cancelling_at "
    "cancelled_at"
)
_TOLD_OF_ANSWERS = {
    **dict.fromkeys(_ECHOED.split(), "As in the request"),
    **dict.fromkeys(_TIMES.split(), "When, in seconds since 1970"),
    **dict.fromkeys(("refusal", "logprobs", "annotations"), "Always null or empty"),
    **dict.fromkeys(("item_id", "output_index", "content_index"), "Where in `output` the event happens"),
    "id": "The answer's id, or the model's",
    "object": "What this is",
    "type": "What this is",
    "model": "The model that answered",
    "choices": "The answers, best first, or pieces of them",
    "usage": "How many tokens were read and written",
    "guidance": "What was done, and how every trajectory came out",
    "trace": "`trace[prompt][trajectory][step]`, on request",
    "canvas": "With `stream_canvas`: a trajectory after a step",
    "role": "Whose turn it is",
    "content": "What the turn says, or the piece of it to append",
    "text": "The text, or the piece of it to append",
    "message": "The turn",
    "delta": "What to append",
    "error": "What went wrong",
    "status": "How far the answer is",
    "incomplete_details": "Why the text has no end",
    "output": "The turn that answers",
    "item": "The turn so far",
    "part": "Its text so far",
    "response": "The answer so far",
    "sequence_number": "The event's number, from 0",
    "input_tokens": "Tokens of the prompt",
    "input_tokens_details": "None is kept from one request to the next",
    "output_tokens": "Tokens of the text",
    "output_tokens_details": "`trajectory_tokens`: tokens of all `best_of` trajectories",
    "total_tokens": "Both together",
}
"""What fields say whose name has one meaning everywhere; others have a docstring where they are declared."""
_DESCRIBED: list[type[BaseModel]] = [ErrorEnvelope]
"""Schemas that routes name and FastAPI does not see."""
_REQUEST_ID = {
    "description": "The request's id: the client's own, if it may stand in a log, else a new one",
    "required": True,
    "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,128}$"},
}
_RETRY_AFTER = {"description": "Seconds to wait", "schema": {"type": "integer", "minimum": 1}}
_HEADERS: dict[str, Document] = {
    "401": {
        "WWW-Authenticate": {"description": "The scheme to use", "required": True, "schema": {"type": "string"}},
    },
    "408": {
        "x-should-retry": {
            "description": "Tells clients that retry a 408 by habit not to",
            "required": True,
            "schema": {"const": "false"},
        },
    },
    "429": {"Retry-After": {**_RETRY_AFTER, "required": True}},
    "503": {"Retry-After": _RETRY_AFTER},
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Documented error responses; 401, 431 and 500 can come from every route."""
    reference = {"$ref": _REFERENCE.format(model=ErrorEnvelope.__name__)}
    return {
        status: {"description": STATUSES[status], "content": {"application/json": {"schema": reference}}}
        for status in sorted({*statuses, 401, 431, 500})
    }


def success(
    model: type[BaseModel], description: str, chunk: type[BaseModel] | None = None
) -> dict[int | str, dict[str, Any]]:
    """The documented 200: JSON, and for a route that streams, events that hold a `chunk` each."""
    documented: Document = {"model": model, "description": description}
    if chunk is not None:
        _DESCRIBED.append(chunk)
        documented["content"] = {"text/event-stream": {"schema": _event(chunk)}}
    return {200: documented}


def _event(chunk: type[BaseModel]) -> Document:
    """One server-sent event, whose data is a chunk, an error, or the last word."""
    contents = [{"$ref": _REFERENCE.format(model=model.__name__)} for model in (chunk, ErrorEnvelope)]
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": contents}}
    return {
        "type": "object",
        "required": ["data"],
        "properties": {"data": {"anyOf": [{"const": "[DONE]"}, data]}},
    }


def body(schema: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route that reads `schema` from its body, with examples."""
    _DESCRIBED.append(schema)
    reference = {"$ref": _REFERENCE.format(model=schema.__name__)}
    examples = {title: {"value": value} for title, value in EXAMPLES[schema.__name__].items()}
    content = {"application/json": {"schema": reference, "examples": examples}}
    return {"requestBody": {"required": True, "content": content}}


def install(app: FastAPI, frontend: Frontend) -> None:
    """Make `app.openapi` give the complete document, made anew when what the server takes has changed."""
    made_for: Served | None = None

    def document() -> Document:
        nonlocal made_for
        served = frontend.served
        if app.openapi_schema is not None and served == made_for:
            return app.openapi_schema
        before = DOCUMENTED.set(served)
        made = _build(app, bool(frontend.settings.api_key), ALWAYS_OPEN.union(frontend.settings.public_paths))
        DOCUMENTED.reset(before)
        app.openapi_schema, made_for = made, served
        return made

    app.openapi = document  # type: ignore[method-assign]


def _build(app: FastAPI, keyed: bool, open_paths: Collection[str]) -> Document:
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes, servers=app.servers
    )
    _, definitions = models_json_schema([(each, "validation") for each in _DESCRIBED], ref_template=_REFERENCE)
    components = document.setdefault("components", {})
    components.setdefault("schemas", {}).update(definitions["$defs"])
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)
    for schema in components["schemas"].values():
        told = _TOLD_OF_ANSWERS if schema.get("additionalProperties") is not False else _TOLD_OF_REQUESTS
        for name, field in schema.get("properties", {}).items():
            if name in told:
                field.setdefault("description", told[name])
    if keyed:
        components["securitySchemes"] = {"apiKey": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"apiKey": []}]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            responses = operation["responses"]
            responses.pop("422", None)
            if not keyed or path in open_paths:
                responses.pop("401", None)
            if keyed and path in open_paths:
                operation["security"] = []
            for status, response in responses.items():
                response["headers"] = {"X-Request-Id": _REQUEST_ID, **_HEADERS.get(status, {})}
    return document

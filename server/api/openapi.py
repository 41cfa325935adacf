"""The OpenAPI document, made to be true: bodies that routes read by themselves, and every status they answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.api.errors import ErrorEnvelope

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
    503: "Not ready or shutting down; see Retry-After",
}
_REFERENCE = "#/components/schemas/{model}"


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Documented error responses; 401, 431 and 500 can come from every route."""
    reference = {"$ref": _REFERENCE.format(model=ErrorEnvelope.__name__)}
    return {
        status: {"description": STATUSES[status], "content": {"application/json": {"schema": reference}}}
        for status in sorted({*statuses, 401, 431, 500})
    }


def success(model: type[BaseModel], description: str, media: Sequence[str] = ()) -> dict[int | str, dict[str, Any]]:
    """The documented 200: JSON, and other content types as strings."""
    content = {name: {"schema": {"type": "string"}} for name in media}
    return {200: {"model": model, "description": description, **({"content": content} if content else {})}}


def body(schema: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route that reads `schema` from its body."""
    reference = {"$ref": _REFERENCE.format(model=schema.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


def install(app: FastAPI, schemas: Sequence[type[BaseModel]], *, keyed: bool) -> None:
    """Make `app.openapi` give the complete document. `keyed`: API keys are in force."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _build(app, schemas, keyed)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _build(app: FastAPI, schemas: Sequence[type[BaseModel]], keyed: bool) -> dict[str, Any]:
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes, servers=app.servers
    )
    described: list[type[BaseModel]] = [*schemas, ErrorEnvelope]
    _, definitions = models_json_schema([(each, "validation") for each in described], ref_template=_REFERENCE)
    components = document.setdefault("components", {})
    components.setdefault("schemas", {}).update(definitions["$defs"])
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)
    if keyed:
        components["securitySchemes"] = {"apiKey": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"apiKey": []}]
    return document

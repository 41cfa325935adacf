"""Answering one line of a batch: the handler of its endpoint answers it as a request of a lower priority.

A line that finds no room waits for it. One that fails has an error of its own, which names the line, and the field as
the endpoint's own error does.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.responses import Response

from server.api.answers import Answer
from server.api.batches import Batch, Endpoint
from server.api.body import SMALL_BYTES, parse
from server.api.errors import envelope, unexpected, validate
from server.api.fields import ChatCompletionRequest, CompletionRequest
from server.api.frontend import Frontend
from server.api.lines import Line, Results, custom_id_of
from server.api.responses import ResponsesRequest
from server.api.routes import chat_completions, completions, respond
from server.errors import BodyTooLarge, Draining, InvalidRequest, QueueFull, RequestError, Unavailable
from server.log import request_id

Result = TypeVar("Result")
Handler = Callable[[Frontend, Any], Coroutine[Any, Any, Response | Answer]]
ENDPOINTS: dict[Endpoint, tuple[type[BaseModel], Handler]] = {
    "/v1/completions": (CompletionRequest, completions),
    "/v1/chat/completions": (ChatCompletionRequest, chat_completions),
    "/v1/responses": (ResponsesRequest, respond),
}


async def answer_line(frontend: Frontend, batch: Batch, number: int, data: bytes, results: Results) -> None:
    """Write what has come of a line to `results`. Raises Draining when the server stops first."""
    request_id.set(f"{batch.id}-{number}")
    name: str | None = None
    status, failed = 200, False
    try:
        most = frontend.settings.max_body_bytes
        if len(data.rstrip(b"\r\n")) > most:
            raise BodyTooLarge(f"the line takes more than {most} bytes")
        value = await _read(frontend, data, lambda: parse(data))
        name = custom_id_of(value)
        asked = await _read(frontend, data, lambda: _understood(frontend, batch, number, value, results))
        body = await _patiently(lambda: _answered(frontend, batch.endpoint, asked))
    except Draining:
        raise
    except Exception as caught:
        error = caught if isinstance(caught, RequestError) else unexpected(caught)
        told = envelope(error)["error"]
        body, status, failed = {"error": told | {"message": f"line {number}: {told['message']}"}}, error.status, True
    response = {"status_code": status, "request_id": request_id.get(), "body": body}
    await asyncio.to_thread(results.add, [(number, name, {"response": response})], failed=failed)
    batch.count(results.counts)
    frontend.metrics.batch_lines.labels("failed" if failed else "completed").inc()


def _understood(frontend: Frontend, batch: Batch, number: int, value: object, results: Results) -> BaseModel:
    """The request in a line. Raises InvalidRequest and UnknownModel."""
    line = validate(Line, value)
    if line.url != batch.endpoint:
        raise InvalidRequest(f"`url` must be the batch's endpoint, {batch.endpoint}", "url")
    first = results.first(line.custom_id, number)
    if first != number:
        raise InvalidRequest(f"`custom_id` is that of line {first}, too", "custom_id")
    schema, _ = ENDPOINTS[batch.endpoint]
    asked = validate(schema, line.body, frontend.served)
    if getattr(asked, "stream", False):
        raise InvalidRequest("`stream` must be false in a batch", "stream")
    return asked


async def _answered(frontend: Frontend, endpoint: Endpoint, asked: BaseModel) -> Any:
    """The endpoint's answer, as JSON-ready data."""
    _, handler = ENDPOINTS[endpoint]
    answer = await handler(frontend, asked)
    return answer.to_json() if isinstance(answer, Answer) else json.loads(bytes(answer.body))


async def _read(frontend: Frontend, data: bytes, work: Callable[[], Result]) -> Result:
    """What `work` makes of a line, aside where that would hold up the event loop."""
    return await _patiently(lambda: frontend.aside(work)) if len(data) > SMALL_BYTES else work()


async def _patiently(work: Callable[[], Awaitable[Result]]) -> Result:
    """The result of `work`, which is begun anew until there is room for it. Raises Draining."""
    while True:
        try:
            return await work()
        except (QueueFull, Unavailable) as error:
            if isinstance(error, Draining):
                raise
            await asyncio.sleep(error.retry_after or 1.0)

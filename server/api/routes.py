"""Completions, chats and responses. A route reads, converts and hands over; errors are translated in one place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from server.api import responses
from server.api.answers import (
    ChatCompletionChunk,
    ChatCompletionResponse,
    CompletionChunk,
    CompletionResponse,
    Data,
    response,
)
from server.api.body import posts
from server.api.convert import Asked, Plan, make_plan
from server.api.fields import ChatCompletionRequest, CompletionRequest
from server.api.frontend import Frontend
from server.api.generation import results
from server.api.stream import Chunks, open_stream
from server.errors import InvalidRequest
from server.types import JobResult

router = APIRouter()
ANSWERS = "The answers, or a stream of events"


@posts(router, ["/v1/completions"], CompletionRequest, CompletionResponse, ANSWERS, CompletionChunk)
async def completions(frontend: Frontend, asked: CompletionRequest) -> Response:
    """Complete prompts; with `suffix`, fill in what lies between."""
    return await _answer(frontend, asked)


@posts(router, ["/v1/chat/completions"], ChatCompletionRequest, ChatCompletionResponse, ANSWERS, ChatCompletionChunk)
async def chat_completions(frontend: Frontend, asked: ChatCompletionRequest) -> Response:
    """Answer a conversation."""
    return await _answer(frontend, asked)


@posts(router, ["/v1/responses"], responses.ResponsesRequest, responses.Whole, ANSWERS, responses.AnyEvent)
async def respond(frontend: Frontend, asked: responses.ResponsesRequest) -> Response:
    """Answer a text or a conversation, which is kept nowhere."""
    return await _answer(frontend, asked, responses.response, responses.Events)


async def _answer(
    frontend: Frontend,
    asked: Asked,
    whole: Callable[[Plan, Sequence[JobResult]], Data] = response,
    chunks: type[Chunks] = Chunks,
) -> Response:
    frontend.engine.check_room(priority=frontend.priority)
    tokenizer = await frontend.tokenizer()
    info, settings, identity = frontend.engine.info, frontend.settings, frontend.answer_id()
    try:
        plan = await frontend.aside(lambda: make_plan(asked, info, tokenizer, settings, identity))
    except InvalidRequest as error:
        error.param = asked.source if error.param == "messages" else error.param
        raise
    if asked.stream:
        return await open_stream(frontend, plan, tokenizer, chunks)
    return JSONResponse(whole(plan, await results(frontend, plan)))

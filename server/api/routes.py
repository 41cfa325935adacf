"""Completions and chat completions. A route reads, converts and hands over; errors are translated in one place."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from server.api.answers import (
    ChatCompletionChunk,
    ChatCompletionResponse,
    CompletionChunk,
    CompletionResponse,
    response,
)
from server.api.body import posts
from server.api.convert import Asked, make_plan
from server.api.fields import ChatCompletionRequest, CompletionRequest
from server.api.frontend import Frontend
from server.api.generation import results
from server.api.stream import open_stream

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


async def _answer(frontend: Frontend, asked: Asked) -> Response:
    frontend.engine.check_room()
    tokenizer = await frontend.tokenizer()
    info, settings, identity = frontend.engine.info, frontend.settings, frontend.answer_id()
    plan = await frontend.aside(lambda: make_plan(asked, info, tokenizer, settings, identity))
    if asked.stream:
        return await open_stream(frontend, plan, tokenizer)
    return JSONResponse(response(plan, await results(frontend, plan)))

"""Completions and chat completions. A route reads, converts and hands over; errors are translated in one place."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import TypeVar

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from server.api import body
from server.api.answers import ChatCompletionResponse, CompletionResponse, response
from server.api.chunks import ChatCompletionChunk, CompletionChunk
from server.api.convert import Plan, chat_plan, completion_plan
from server.api.disconnect import unless_disconnected
from server.api.fields import ChatCompletionRequest, CompletionRequest
from server.api.frontend import Frontend
from server.api.generation import results
from server.api.openapi import body as documented_body
from server.api.openapi import errors, success
from server.api.ops import frontend_of
from server.api.rules import Limits
from server.api.stream import open_stream
from server.text.tokenizer import Tokenizer
from server.types import EngineInfo

router = APIRouter()
Asked = TypeVar("Asked", CompletionRequest, ChatCompletionRequest)
MakePlan = Callable[[Asked, EngineInfo, Tokenizer, Limits, str], Plan]
ANSWERS = "The answers, or a stream of events"
STATUSES = (400, 404, 408, 413, 415, 429, 503)


@router.post(
    "/v1/completions",
    responses=success(CompletionResponse, ANSWERS, CompletionChunk) | errors(*STATUSES),
    openapi_extra=documented_body(CompletionRequest),
)
async def completions(request: Request) -> Response:
    """Complete prompts; with `suffix`, fill in what lies between."""
    frontend = frontend_of(request)
    asked = await body.read(request, CompletionRequest)
    return await _answer(request, frontend, completion_plan, asked)


@router.post(
    "/v1/chat/completions",
    responses=success(ChatCompletionResponse, ANSWERS, ChatCompletionChunk) | errors(*STATUSES),
    openapi_extra=documented_body(ChatCompletionRequest),
)
async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    frontend = frontend_of(request)
    asked = await body.read(request, ChatCompletionRequest)
    return await _answer(request, frontend, chat_plan, asked)


async def _answer(request: Request, frontend: Frontend, make_plan: MakePlan[Asked], asked: Asked) -> Response:
    frontend.check_room()
    tokenizer = await frontend.tokenizer()
    planning = frontend.aside(make_plan, asked, frontend.info, tokenizer, frontend.limits, uuid.uuid4().hex)
    plan = await unless_disconnected(request.receive, planning)
    if plan.stream is not None:
        return await open_stream(frontend, plan, plan.stream, tokenizer, frontend.info.model.stop_token_ids)
    answers = await unless_disconnected(request.receive, results(frontend, plan))
    return JSONResponse(response(plan, answers).to_json())

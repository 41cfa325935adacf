"""Scores and rankings by a reward model alone, and the tokenizer's routes."""

from __future__ import annotations

import time
import uuid
from typing import Literal

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from server.api import body
from server.api.answers import Answer
from server.api.convert import check_model, messages
from server.api.disconnect import unless_disconnected
from server.api.frontend import Frontend
from server.api.openapi import body as documented_body
from server.api.openapi import errors, success
from server.api.ops import frontend_of
from server.api.schemas import DetokenizeRequest, RerankRequest, ScoreRequest, TokenizeRequest
from server.errors import InvalidRequest, UnknownModel, quote
from server.text.tokenizer import Tokenizer
from server.types import EngineInfo, Message

router = APIRouter()
STATUSES = (400, 404, 408, 413, 415, 429, 503)


class ReadUsage(Answer):
    """Tokens that the reward model read: each conversation with its response, in its chat template."""

    prompt_tokens: int
    total_tokens: int


class Score(Answer):
    """The reward of one pair."""

    index: int
    object: Literal["score"]
    score: float


class ScoreResponse(Answer):
    """Answer to `POST /v1/score`."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Score]
    usage: ReadUsage


class Document(Answer):
    """A ranked text."""

    text: str


class RankedDocument(Answer):
    """A document's place: `relevance_score` is its reward as a response to the query."""

    index: int
    document: Document
    relevance_score: float


class RerankResponse(Answer):
    """Answer to `POST /v1/rerank`."""

    id: str
    model: str
    results: list[RankedDocument]
    usage: ReadUsage


class TokenizeResponse(Answer):
    """Answer to `POST /tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeResponse(Answer):
    """Answer to `POST /detokenize`."""

    prompt: str


@router.post(
    "/v1/score",
    responses=success(ScoreResponse, "Scores") | errors(*STATUSES),
    openapi_extra=documented_body(ScoreRequest),
)
async def score(request: Request) -> Response:
    """Reward of each response to its prompt."""
    frontend = frontend_of(request)
    asked = await body.read(request, ScoreRequest)
    name = _reward_model(asked.model, frontend.info)
    queries = [messages(query) for query in asked.queries]
    if len(queries) == 1:
        queries *= len(asked.documents)
    if len(queries) != len(asked.documents):
        raise InvalidRequest(
            f"there are {len(queries)} queries and {len(asked.documents)} documents; give one query, or as many of "
            "the one as of the other",
            "documents",
        )
    rewards, usage = await _rewards(request, frontend, name, list(zip(queries, asked.documents, strict=True)))
    answer = ScoreResponse(
        id=f"score-{uuid.uuid4().hex}",
        object="list",
        created=int(time.time()),
        model=name,
        data=[Score(index=index, object="score", score=reward) for index, reward in enumerate(rewards)],
        usage=usage,
    )
    return JSONResponse(answer.to_json())


@router.post(
    "/v1/rerank",
    responses=success(RerankResponse, "Documents, best first") | errors(*STATUSES),
    openapi_extra=documented_body(RerankRequest),
)
async def rerank(request: Request) -> Response:
    """Responses to one prompt, best first; equal ones in the order given."""
    frontend = frontend_of(request)
    asked = await body.read(request, RerankRequest)
    name = _reward_model(asked.model, frontend.info)
    query = messages(asked.query)
    rewards, usage = await _rewards(request, frontend, name, [(query, document) for document in asked.documents])
    order = sorted(range(len(rewards)), key=lambda index: (-rewards[index], index))
    answer = RerankResponse(
        id=f"rerank-{uuid.uuid4().hex}",
        model=name,
        results=[
            RankedDocument(index=index, document=Document(text=asked.documents[index]), relevance_score=rewards[index])
            for index in order[: asked.top_n or len(order)]
        ],
        usage=usage,
    )
    return JSONResponse(answer.to_json())


@router.post(
    "/tokenize",
    responses=success(TokenizeResponse, "Token ids") | errors(*STATUSES),
    openapi_extra=documented_body(TokenizeRequest),
)
async def tokenize(request: Request) -> Response:
    """Ids of a raw prompt, or of messages in the chat template, exactly as generation would see them."""
    frontend = frontend_of(request)
    asked = await body.read(request, TokenizeRequest)
    check_model(asked.model, frontend.info, frontend.limits.aliases)
    tokenizer = await frontend.tokenizer()
    if (asked.prompt is None) == (asked.messages is None):
        raise InvalidRequest("give either `prompt` or `messages`", "prompt")
    if asked.messages is not None:
        generation = asked.add_generation_prompt is not False
        tokens = await frontend.aside(tokenizer.render_chat, messages(asked.messages), generation)
    elif asked.add_generation_prompt is not None:
        raise InvalidRequest("`add_generation_prompt` needs `messages`", "add_generation_prompt")
    else:
        tokens = await frontend.aside(tokenizer.encode, asked.prompt or "")
    return await frontend.aside(_tokens, tokens, tokenizer, frontend.info, bool(asked.return_token_strs))


def _tokens(tokens: list[int], tokenizer: Tokenizer, info: EngineInfo, with_strings: bool) -> Response:
    strings = None
    if with_strings:
        names = {token: tokenizer.token_string(token) or "" for token in set(tokens)}
        strings = [names[token] for token in tokens]
    answer = TokenizeResponse(
        count=len(tokens), max_model_len=info.model.context_length, tokens=tokens, token_strs=strings
    )
    return JSONResponse(answer.to_json())


@router.post(
    "/detokenize",
    responses=success(DetokenizeResponse, "Text") | errors(*STATUSES),
    openapi_extra=documented_body(DetokenizeRequest),
)
async def detokenize(request: Request) -> Response:
    """Text of token ids, special tokens included."""
    frontend = frontend_of(request)
    asked = await body.read(request, DetokenizeRequest)
    check_model(asked.model, frontend.info, frontend.limits.aliases)
    vocab_size = frontend.info.model.vocab_size
    for index, token in enumerate(asked.tokens):
        if token >= vocab_size:
            raise InvalidRequest(f"token id {token} is outside the vocabulary of {vocab_size}", f"tokens.{index}")
    tokenizer = await frontend.tokenizer()
    text = await frontend.aside(tokenizer.decode, asked.tokens, skip_special_tokens=False)
    return JSONResponse(DetokenizeResponse(prompt=text).to_json())


def _reward_model(name: str | None, info: EngineInfo) -> str:
    """The reward model to use: the named one, else the first loaded."""
    loaded = [reward.id for reward in info.reward_models]
    if name is None:
        if not loaded:
            raise InvalidRequest("no reward model is loaded", "model")
        return loaded[0]
    if name not in loaded:
        raise UnknownModel(f"there is no reward model {quote(name)}; loaded: {', '.join(loaded) or 'none'}")
    return name


async def _rewards(
    request: Request, frontend: Frontend, name: str, pairs: list[tuple[tuple[Message, ...], str]]
) -> tuple[list[float], ReadUsage]:
    if len(pairs) > frontend.limits.max_score_pairs:
        limit = frontend.limits.max_score_pairs
        raise InvalidRequest(f"there are {len(pairs)} documents; the limit is {limit}", "documents")
    characters = sum(len(text) + sum(len(turn.content) for turn in query) for query, text in pairs)
    if characters > frontend.limits.max_score_characters:
        limit = frontend.limits.max_score_characters
        raise InvalidRequest(
            f"all pairs of query and document hold {characters} characters; the limit is {limit}", "documents"
        )
    timeout = frontend.limits.request_timeout
    deadline = None if timeout is None else time.time() + timeout
    scored = await unless_disconnected(request.receive, frontend.engine.scored(name, pairs, deadline=deadline))
    return scored.scores, ReadUsage(prompt_tokens=scored.tokens, total_tokens=scored.tokens)

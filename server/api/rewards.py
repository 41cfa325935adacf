"""Scores and rankings by a reward model or a scorer alone, and the tokenizer's routes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Literal

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from server.api.answers import Answer
from server.api.body import posts
from server.api.convert import messages, templated
from server.api.fields import DetokenizeRequest, RerankRequest, ScoreRequest, Templated, TokenizeRequest
from server.api.frontend import Frontend
from server.api.rules import rewarders
from server.errors import InvalidRequest
from server.log import note
from server.text.tokenizer import Tokenizer
from server.types import Message, ModelInfo

router = APIRouter()


class ReadUsage(Answer):
    """Tokens that the reward model read: each conversation with its response, in its chat template. What outside
    scorers read is not known, and counts as 0."""

    prompt_tokens: int
    """Tokens that were read"""
    total_tokens: int
    """The same: none are generated"""


class Score(Answer):
    """The reward of one pair."""

    index: int
    """The pair's place in the request"""
    object: Literal["score"]
    score: float
    """Its reward"""


class ScoreResponse(Answer):
    """Answer to `POST /v1/score`."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Score]
    """One entry for each pair, in their order"""
    usage: ReadUsage


class RankedDocument(Answer):
    """A document's place: `relevance_score` is its reward as a response to the query, of any size."""

    index: int
    """The document's place in the request"""
    relevance_score: float
    """Its reward, of any size"""
    document: dict[Literal["text"], str] | str = ""
    """The document as it was sent, unless `return_documents` is false"""


class RerankResponse(Answer):
    """Answer to `POST /v1/rerank`. `meta` counts the tokens once more, where Cohere's clients look for them."""

    id: str
    model: str
    results: list[RankedDocument]
    """The documents, best first"""
    usage: ReadUsage
    meta: dict[Literal["tokens", "billed_units"], dict[str, int]]
    """The tokens once more, for Cohere's clients"""


class TokenizeResponse(Answer):
    """Answer to `POST /tokenize`."""

    count: int
    """How many tokens there are"""
    max_model_len: int
    """How many the model reads at most"""
    tokens: list[int]
    """Their ids"""
    token_strs: list[str] | None
    """Their texts, on request"""


class DetokenizeResponse(Answer):
    """Answer to `POST /detokenize`."""

    prompt: str
    """The text"""


@posts(router, ["/v1/score"], ScoreRequest, ScoreResponse, "Scores")
async def score(frontend: Frontend, asked: ScoreRequest) -> ScoreResponse:
    """Reward of each response to its prompt."""
    queries = [messages(query) for query in asked.queries]
    if len(queries) == 1:
        queries *= len(asked.documents)
    if len(queries) != len(asked.documents):
        raise InvalidRequest(
            f"there are {len(queries)} queries and {len(asked.documents)} documents; give one query, or as many of "
            "the one as of the other",
            "documents",
        )
    name, rewards, usage = await _rewards(frontend, asked, queries)
    return ScoreResponse(
        id=f"score-{frontend.answer_id()}",
        object="list",
        created=int(time.time()),
        model=name,
        data=[Score(index=index, object="score", score=reward) for index, reward in enumerate(rewards)],
        usage=usage,
    )


@posts(router, ["/v1/rerank", "/v2/rerank", "/rerank"], RerankRequest, RerankResponse, "Documents, best first")
async def rerank(frontend: Frontend, asked: RerankRequest) -> RerankResponse:
    """Responses to one prompt, best first; equal ones in the order given."""
    return await _rerank(frontend, asked, lambda text: {"text": text})


@posts(router, ["/infinity/rerank"], RerankRequest, RerankResponse, "Documents, best first")
async def infinity_rerank(frontend: Frontend, asked: RerankRequest) -> RerankResponse:
    """The same for clients of Infinity, which read each result's document as a string."""
    return await _rerank(frontend, asked, lambda text: text)


async def _rerank(
    frontend: Frontend, asked: RerankRequest, shown: Callable[[str], dict[Literal["text"], str] | str]
) -> RerankResponse:
    queries = [messages(asked.query)] * len(asked.documents)
    name, rewards, usage = await _rewards(frontend, asked, queries)
    best = sorted(range(len(rewards)), key=lambda index: (-rewards[index], index))[: asked.top_n or None]
    results = [RankedDocument(index=index, relevance_score=rewards[index]) for index in best]
    for result in results if asked.return_documents else ():
        result.document = shown(asked.documents[result.index])
    return RerankResponse(
        id=f"rerank-{frontend.answer_id()}",
        model=name,
        results=results,
        usage=usage,
        meta={"tokens": {"input_tokens": usage.total_tokens}, "billed_units": {"input_tokens": usage.total_tokens}},
    )


@posts(router, ["/tokenize"], TokenizeRequest, TokenizeResponse, "Token ids")
async def tokenize(frontend: Frontend, asked: TokenizeRequest) -> Response:
    """Ids of a raw prompt, or of messages in the chat template, exactly as generation would see them."""
    tokenizer = await frontend.tokenizer()
    return await frontend.aside(lambda: _tokenize(asked, tokenizer, frontend.engine.info.model))


def _tokenize(asked: TokenizeRequest, tokenizer: Tokenizer, model: ModelInfo) -> Response:
    if (asked.prompt is None) == (asked.messages is None):
        raise InvalidRequest("give either `prompt` or `messages`", "prompt")
    if asked.messages is not None:
        tokens = templated(asked, messages(asked.messages), model, tokenizer)
    elif alone := Templated.model_fields.keys() & asked.model_fields_set:
        raise InvalidRequest(f"`{min(alone)}` needs `messages`", min(alone))
    else:
        tokens = tokenizer.encode(asked.prompt or "")
    strings = None
    if asked.return_token_strs:
        names = {token: tokenizer.token_string(token) or "" for token in set(tokens)}
        strings = [names[token] for token in tokens]
    answer = TokenizeResponse(count=len(tokens), max_model_len=model.context_length, tokens=tokens, token_strs=strings)
    return JSONResponse(answer.to_json())


@posts(router, ["/detokenize"], DetokenizeRequest, DetokenizeResponse, "Text")
async def detokenize(frontend: Frontend, asked: DetokenizeRequest) -> DetokenizeResponse:
    """Text of token ids, special tokens included."""
    tokenizer = await frontend.tokenizer()
    text = await frontend.aside(lambda: tokenizer.decode(asked.tokens, skip_special_tokens=False))
    return DetokenizeResponse(prompt=text)


async def _rewards(
    frontend: Frontend, asked: ScoreRequest | RerankRequest, queries: Sequence[tuple[Message, ...]]
) -> tuple[str, list[float], ReadUsage]:
    """The reward model or scorer (the named one, else the first), its reward of each pair, and the tokens it read."""
    name = asked.model or next(iter(rewarders(frontend.engine.info, frontend.settings)), None)
    if name is None:
        raise InvalidRequest("no reward model is loaded", "model")
    pairs = list(zip(queries, asked.documents, strict=True))
    characters = sum(len(text) + sum(len(turn.content) for turn in query) for query, text in pairs)
    most = 2 * frontend.settings.max_body_bytes  # one query goes with each document: the body's size is no bound
    if characters > most:
        message = f"all pairs of query and document hold {characters} characters; the limit is {most}"
        raise InvalidRequest(message, "documents")
    timeout = frontend.settings.request_timeout
    deadline = None if timeout is None else time.time() + timeout
    note(model=name)
    with frontend.shares.taken():
        scored = await frontend.engine.score(name, pairs, deadline=deadline, metadata=asked.metadata)
    note(tokens=scored.tokens)
    return name, scored.scores, ReadUsage(prompt_tokens=scored.tokens, total_tokens=scored.tokens)

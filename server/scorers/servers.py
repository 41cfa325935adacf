"""Scorers behind HTTP: another server of ours, vLLM, text-embeddings-inference. No address comes from a request."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import httpx
import msgspec

from server.errors import ConfigurationError
from server.scorers.calls import CallFailed, Metadata, Pair, finite, turns
from server.text.template import query_text
from server.wire.config import OutsideScorer

MAX_ANSWER_BYTES = 4 * 2**20
MAX_PAIRS = 64
TEI_PAIRS = 32  # its `max_client_batch_size`, unless it is told otherwise


class _Scored(msgspec.Struct):
    index: int
    score: float


class _Classified(msgspec.Struct):
    index: int
    probs: list[float]


class _Scores(msgspec.Struct):
    data: list[_Scored]


class _Classes(msgspec.Struct):
    data: list[_Classified]


@dataclass(frozen=True, slots=True)
class Kind:
    """What a kind of server takes and gives: where, the request's body, the answer's type; how many pairs at once, and
    whether these must share their query."""

    path: str
    body: Callable[[Sequence[Pair], Metadata], dict[str, Any]]
    answer: Any
    most: int = MAX_PAIRS
    one_query: bool = False


def _documents(pairs: Sequence[Pair]) -> list[str]:
    return [text for _, text in pairs]


def _shared(queries: list[Any]) -> Any:
    """The query of all pairs, or each pair's."""
    return queries[0] if all(query == queries[0] for query in queries) else queries


def _entrgi(pairs: Sequence[Pair], metadata: Metadata) -> dict[str, Any]:
    queries = _shared([turns(conversation) for conversation, _ in pairs])
    known = {} if metadata is None else {"metadata": metadata}
    return {"queries": queries, "documents": _documents(pairs)} | known


def _vllm_score(pairs: Sequence[Pair], _: Metadata) -> dict[str, Any]:
    return {"text_1": _shared([query_text(conversation) for conversation, _ in pairs]), "text_2": _documents(pairs)}


def _vllm_classify(pairs: Sequence[Pair], _: Metadata) -> dict[str, Any]:
    return {"input": _documents(pairs)}


def _tei_rerank(pairs: Sequence[Pair], _: Metadata) -> dict[str, Any]:
    return {"query": query_text(pairs[0][0]), "texts": _documents(pairs), "raw_scores": True}


KINDS = {
    "entrgi": Kind("/v1/score", _entrgi, _Scores),
    "vllm-score": Kind("/score", _vllm_score, _Scores),
    "vllm-classify": Kind("/classify", _vllm_classify, _Classes),
    "tei-rerank": Kind("/rerank", _tei_rerank, list[_Scored], TEI_PAIRS, one_query=True),
}
"""Sources: docs/api.md; vLLM's entrypoints/pooling; text-embeddings-inference's docs/openapi.json."""


class Server:
    """A target over HTTP: pooled connections, redirects not followed, answers bounded and never decompressed."""

    def __init__(self, scorer: OutsideScorer) -> None:
        self._scorer = scorer
        self._kind = KINDS[scorer.kind]
        self._client: httpx.AsyncClient | None = None

    async def start(self) -> None:
        """Raises ConfigurationError where the API key or the address is none."""
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        if (variable := self._scorer.key_env) is not None:
            if not (key := os.environ.get(variable)):
                raise ConfigurationError(f"scorers: {self._scorer.name}: the environment has no {variable}")
            headers["Authorization"] = f"Bearer {key}"
        url = self._scorer.target.partition("+")[2]
        limits = httpx.Limits(max_connections=self._scorer.calls, max_keepalive_connections=self._scorer.calls)
        try:
            self._client = httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=None)
        except (httpx.InvalidURL, UnicodeEncodeError) as error:
            raise ConfigurationError(f"scorers: {self._scorer.name}: {error}") from error

    def batches(self, pairs: Sequence[Pair]) -> Iterator[Sequence[Pair]]:
        """The pairs, in order, in parts for one call each: as many as the kind of server takes, of one query where it
        must be one."""
        for _, group in groupby(pairs, lambda pair: query_text(pair[0]) if self._kind.one_query else ""):
            rest = list(group)
            while rest:
                yield rest[: self._kind.most]
                rest = rest[self._kind.most :]

    async def ask(self, pairs: Sequence[Pair], metadata: Metadata) -> list[float]:
        """One finite score a pair, in order. Raises CallFailed."""
        assert self._client is not None
        body = self._kind.body(pairs, metadata)
        if self._scorer.model is not None:
            body["model"] = self._scorer.model
        content = json.dumps(body).encode()
        try:
            async with asyncio.timeout(self._scorer.timeout_seconds):
                async with self._client.stream("POST", self._kind.path, content=content) as response:
                    _check(response)
                    data = bytearray()
                    async for part in response.aiter_raw():
                        data += part
                        if len(data) > MAX_ANSWER_BYTES:
                            raise CallFailed("answer", f"answered with more than {MAX_ANSWER_BYTES} bytes")
        except TimeoutError as error:
            raise CallFailed("timeout", f"did not answer within {self._scorer.timeout_seconds:g} seconds") from error
        except httpx.TransportError as error:
            raise CallFailed("connection", "cannot be reached") from error
        return self._read(bytes(data), len(pairs))

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.aclose()

    def _read(self, data: bytes, count: int) -> list[float]:
        """The scores in the order of the pairs, which an answer's indices give. Raises CallFailed."""
        try:
            answer = msgspec.json.decode(data, type=self._kind.answer)
            rows = answer if isinstance(answer, list) else answer.data
            scores = {row.index: self._score(row) for row in rows}
            ordered = [scores[index] for index in range(count)] if len(rows) == count else None
        except (msgspec.DecodeError, UnicodeDecodeError, LookupError):
            ordered = None
        return finite(ordered, count)

    def _score(self, row: _Scored | _Classified) -> float:
        if isinstance(row, _Scored):
            return row.score
        assert self._scorer.label is not None
        return row.probs[self._scorer.label]


def _check(response: httpx.Response) -> None:
    """Raises CallFailed for a status that is no answer."""
    status = response.status_code
    if status == 429 or status >= 500:
        after = response.headers.get("retry-after", "")
        raise CallFailed("status", f"answered with status {status}", float(after) if after.isdecimal() else 0.0)
    if status != 200:
        raise CallFailed("refused", f"answered with status {status}")

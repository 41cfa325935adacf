"""Scorers for tests: functions, and stubs of the servers that scorers may be, made from what those publish."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jsonschema_rs

from server.wire.config import OutsideScorer

# -- functions, which servers call in processes of their own ----------------------------------------------------


def length(conversations: list[list[dict[str, str]]], metadata: list[dict[str, Any] | None]) -> list[int]:
    """The number of characters of each response; it prints, which must not matter."""
    print("no score", flush=True)
    return [len(turns[-1]["content"]) for turns in conversations]


def scripted(conversations: list[list[dict[str, str]]], metadata: list[dict[str, Any] | None]) -> object:
    """What `do` in the metadata, or else the first response, says in its first word; the lengths for any other."""
    word, _, rest = ((metadata[0] or {}).get("do") or conversations[0][-1]["content"]).partition(" ")
    match word:
        case "hang":
            time.sleep(3600)
        case "wait":
            while not Path(rest).exists():
                time.sleep(0.01)
        case "die":
            os._exit(3)
        case "raise":
            raise ValueError(f"secret {rest}")
        case "few":
            return [1.0] * (len(conversations) - 1)
        case "nothing":
            return None
        case "words":
            return ["good"] * len(conversations)
        case "nan" | "inf":
            return [float(word)] * len(conversations)
        case "pid":
            return [os.getpid()] * len(conversations)
        case "metadata":
            return [len(json.dumps(each)) for each in metadata]
        case "turns":
            return [1000 * len(turns) + len(turns[0]["content"]) for turns in conversations]
    return length(conversations, metadata)


# -- servers -----------------------------------------------------------------------------------------------------

Answer = tuple[int, dict[str, str], bytes]


@dataclass
class Stub:
    """A server that gives whatever `answer` makes of a path and a body (None of a GET), and remembers what it was asked
    in a POST."""

    answer: Callable[[str, Any], Answer]
    url: str = ""
    asked: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)
    """Set at the end, for answers that wait."""


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who asked may leave at any moment; anything else is told."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def stub(answer: Callable[[str, Any], Answer]) -> Iterator[Stub]:
    """A stub on the loopback; what waits in it is released at the end."""
    made = Stub(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._give(None)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            made.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
            self._give(body)

        def _give(self, body: Any) -> None:
            status, headers, data = made.answer(self.path, body)
            try:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                self.close_connection = True  # whoever asked has left

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with _Quiet(("127.0.0.1", 0), Handler) as server:
        made.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield made
        finally:
            made.released.set()
            server.shutdown()
            thread.join()


def hanging(made: Callable[[], Stub], body: bytes = b"") -> Callable[[str, Any], Answer]:
    """An answer that waits for the end."""

    def answer(path: str, asked: Any) -> Answer:
        made().released.wait()
        return 200, {}, body

    return answer


def ok(data: object) -> Answer:
    """An answer in JSON."""
    return 200, {"Content-Type": "application/json"}, json.dumps(data).encode()


# -- what the servers publish ------------------------------------------------------------------------------------

_TEXTS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
_NULLABLE = {"type": ["boolean", "null"]}
_USAGE = {"type": "object", "required": ["prompt_tokens", "total_tokens"]}


def _vllm(row: dict[str, Any]) -> dict[str, Any]:
    """Answers of vLLM: entrypoints/pooling/{score,classify}/protocol.py, as its /openapi.json gives them."""
    rows = {"type": "array", "items": {"type": "object", "required": list(row), "properties": row}}
    return {
        "type": "object",
        "required": ["model", "data", "usage"],
        "properties": {"model": {"type": "string"}, "data": rows, "usage": _USAGE},
    }


@dataclass(frozen=True)
class Published:
    """One endpoint: what it takes, what it gives, and a stub's answer, which puts the length of each text as its
    score."""

    path: str
    request: dict[str, Any]
    response: dict[str, Any]
    answer: Callable[[Any], Any]

    def __call__(self, path: str, body: Any) -> Answer:
        """The answer to a request, both held to what is published."""
        if path != self.path:
            return 404, {}, b""
        if problem := next(iter(jsonschema_rs.validator_for(self.request).iter_errors(body)), None):
            return 422, {}, str(problem).encode()
        made = self.answer(body)
        jsonschema_rs.validate(self.response, made)
        return ok(made)


def _rows(texts: list[str], **row: Callable[[str], Any]) -> dict[str, Any]:
    data = [{"index": index} | {name: of(text) for name, of in row.items()} for index, text in enumerate(texts)]
    return {"model": "m", "data": data, "usage": {"prompt_tokens": 1, "total_tokens": 1}}


PUBLISHED = {
    # huggingface/text-embeddings-inference, docs/openapi.json: RerankRequest, RerankResponse. Best first.
    "tei-rerank": Published(
        "/rerank",
        {
            "type": "object",
            "required": ["query", "texts"],
            "properties": {
                "query": {"type": "string"},
                "texts": {"type": "array", "items": {"type": "string"}, "maxItems": 32},
                "raw_scores": {"type": "boolean"},
                "return_text": {"type": "boolean"},
                "truncate": _NULLABLE,
                "truncation_direction": {"enum": ["Left", "Right"]},
            },
            "additionalProperties": False,
        },
        {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["index", "score"],
                "properties": {
                    "index": {"type": "integer", "minimum": 0},
                    "score": {"type": "number"},
                    "text": {"type": ["string", "null"]},
                },
            },
        },
        lambda body: sorted(
            ({"index": index, "score": float(len(text))} for index, text in enumerate(body["texts"])),
            key=lambda rank: -rank["score"],
        ),
    ),
    # vllm-project/vllm: ScoreTextRequest and ScoreResponse. Two lists are as long as each other.
    "vllm-score": Published(
        "/score",
        {
            "type": "object",
            "required": ["text_1", "text_2"],
            "properties": {"model": {"type": ["string", "null"]}, "text_1": _TEXTS, "text_2": _TEXTS},
            "additionalProperties": False,
        },
        _vllm({"index": {"type": "integer"}, "object": {"const": "score"}, "score": {"type": "number"}}),
        lambda body: _rows(body["text_2"], object=lambda _: "score", score=lambda text: float(len(text))),
    ),
    # vllm-project/vllm: ClassificationCompletionRequest and ClassificationResponse.
    "vllm-classify": Published(
        "/classify",
        {
            "type": "object",
            "required": ["input"],
            "properties": {"model": {"type": ["string", "null"]}, "input": _TEXTS},
            "additionalProperties": False,
        },
        _vllm(
            {
                "index": {"type": "integer"},
                "label": {"type": ["string", "null"]},
                "probs": {"type": "array", "items": {"type": "number"}},
                "num_classes": {"type": "integer"},
            }
        ),
        lambda body: _rows(
            body["input"], label=lambda _: "a", probs=lambda text: [0.5, float(len(text))], num_classes=lambda _: 2
        ),
    ),
}


def outside(name: str, target: str, **fields: Any) -> OutsideScorer:
    """A scorer whose calls are not made again, unless the fields say so."""
    return OutsideScorer(name=name, target=target, **{"retries": 0, **fields})


def function(name: str, **fields: Any) -> OutsideScorer:
    """One of the functions above as a scorer of its name."""
    return outside(name, f"python:{__name__}:{name}", **fields)

"""A seeded source of malformed requests: valid bodies changed in their structure, JSON changed byte by byte, and HTTP
changed byte by byte. Case `i` of seed `s` is always the same bytes."""

from __future__ import annotations

import copy
import json
import math
import random
from typing import Any

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
# Every field of every route, each small enough to be run should it still be valid.
GENERATION: dict[str, Any] = {
    "model": None, "max_tokens": 4, "temperature": 0.7, "top_p": 0.95, "top_k": 5, "seed": 7, "n": 1, "best_of": 2,
    "stop": ["x"], "stream": False, "stream_options": None, "return_token_ids": True, "ignore_eos": False,
    "trace": True, "timeout": 2.0, "user": "u", "metadata": {"a": "b"}, "logit_bias": {}, "frequency_penalty": 0,
    "guidance": {"method": "entrgi", "gradient_steps": 1, "eta": 0.5, "confidence": "base", "start": 0.0, "stop": 1.0,
                 "every": 1, "reward_models": [{"model": "sentiment", "weight": 1.0}]},
    "diffusion": {"steps": 2, "algorithm": "entropy", "algorithm_temperature": None, "deprioritize_eos": True,
                  "block_length": 2, "schedule": "linear", "cfg_scale": 0.0},
}  # fmt: skip
BODIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/completions", {"prompt": "Hi", "suffix": "!", **GENERATION}),
    ("/v1/completions", {"prompt": [[1, 2], [3]], "max_tokens": 2, "diffusion": {"steps": 1}}),
    ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 2, "stream": True, "stream_canvas": True,
                         "stream_options": {"include_usage": True}}),
    ("/v1/chat/completions", {"messages": MESSAGES, "max_completion_tokens": 4, **GENERATION}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
                              "max_tokens": 2, "tools": [], "response_format": {"type": "text"}}),
    ("/v1/score", {"model": "sentiment", "queries": ["a", MESSAGES], "documents": ["b", "c"]}),
    ("/v1/rerank", {"query": "a", "documents": ["b", "c"], "top_n": 1}),
    ("/tokenize", {"messages": MESSAGES, "add_generation_prompt": True, "return_token_strs": True}),
    ("/tokenize", {"prompt": "Hi"}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
)  # fmt: skip
PATHS = (
    "/", "/health", "/ready", "/ping", "/version", "/metrics", "/v1/models", "/v1/models/x", "/openapi.json", "/docs",
    "/v1", "/v1/completions/", "//", "/%00", "/v1/chat", "*", "/..", "/v1/models/%2e%2e", "/?a=b&a=c", "/health?x",
)  # fmt: skip
METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "get", "P\x00ST", "X" * 300)
HEADERS = (
    "Content-Type: text/plain", "Content-Type: application/json; charset=utf-16", "Content-Type: ", "Accept: nothing",
    "Content-Encoding: br", "Transfer-Encoding: chunked", "Expect: 100-continue", "Connection: upgrade",
    "Upgrade: h2c", "Content-Length: 0", "Content-Length: 18446744073709551616", "X-Request-Id: \x7f",
    "X-Request-Id: " + "a" * 300, "Authorization: Bearer", "Authorization: Basic eDp5", "Host: other",
    "Range: bytes=0-",
    "Origin: null", "Cookie: " + "c" * 5000, "X-Forwarded-For: 127.0.0.1", "Content-Length: 7", ":authority: x", "",
)  # fmt: skip

STRINGS = (
    "", " ", "a", "none", "entrgi", "NaN", "null", "\x00", "\ud800", "\u202e", "e\u0301" * 50, "\U0001f600",
    "<|im_end|>",
    "<|mask|>", "{{ 7*7 }}", "{% raw %}", "../../etc/passwd", "%s%n", "'; DROP TABLE", "x" * 3000, "\r\nX: y",
    "sentiment", "concrete", "origin", "maskgit_plus", "even", "guided", "user", "tool",
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 3, 17, 255, 1024, 65536, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30,
    10**400,
    0.0, -0.0, 0.5, 1e-9, 1e-320, 1.5, 1e9, 1e308, -1e308, math.nan, math.inf, -math.inf,
)  # fmt: skip

PIECES = (b"\r\n", b"\n", b"\0", b":", b'"', b"[", b"{", b"\\u", b"\xff", b"NaN")


def value(generator: random.Random, depth: int = 0) -> Any:
    """Any JSON value that Python can write."""
    kind = generator.randrange(8)
    if kind <= 1:
        return generator.choice(STRINGS)
    if kind <= 3:
        return generator.choice(NUMBERS)
    if kind == 4:
        return generator.choice((None, True, False))
    if depth > 3 or kind == 5:
        return generator.choice(([], {}, [[]], [None], {"": None}))
    if kind == 6:
        return [value(generator, depth + 1) for _ in range(generator.randrange(4))]
    return {generator.choice(STRINGS)[:50]: value(generator, depth + 1) for _ in range(generator.randrange(4))}


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything inside a JSON value."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [place for key, child in children for place in ((*path, key), *places(child, (*path, key)))]


def change(body: dict[str, Any], generator: random.Random) -> dict[str, Any]:
    """The body with one to three changes: a value replaced, removed, doubled, nested, or a key renamed or added."""
    changed = copy.deepcopy(body)
    for _ in range(generator.randrange(1, 4)):
        found = places(changed)
        if not found:
            break
        *parents, last = generator.choice(found)
        node: Any = changed
        for key in parents:
            node = node[key]
        how = generator.randrange(6)
        if how <= 1:
            node[last] = value(generator)
        elif how == 2:
            del node[last]
        elif how == 3:
            node[last] = [node[last]] * generator.choice((1, 2, 150))
        elif how == 4 and isinstance(node, dict):
            node[generator.choice((*GENERATION, "prompt", "messages", "logprobs", "echo", "tools"))] = value(generator)
        elif isinstance(node, dict):
            node[generator.choice(STRINGS)[:50] + str(last)] = node.pop(last)
    return changed


def flip(data: bytes, generator: random.Random) -> bytes:
    """The bytes with some of them changed, removed, inserted, repeated or cut off."""
    changed = bytearray(data)
    for _ in range(generator.randrange(1, 6)):
        where = generator.randrange(len(changed) + 1)
        how = generator.randrange(6)
        if how == 0 and where < len(changed):
            changed[where] = generator.randrange(256)
        elif how == 1:
            del changed[where : where + generator.randrange(1, 9)]
        elif how == 2:
            changed[where:where] = generator.randbytes(generator.randrange(1, 5))
        elif how == 3:
            changed[where:where] = changed[where : where + generator.randrange(1, 40)]
        elif how == 4:
            changed[where:where] = generator.choice(PIECES)
        elif generator.random() < 0.2:
            del changed[where:]
    return bytes(changed)


def wire(method: str, path: str, headers: list[str], body: bytes) -> bytes:
    """A request as it should be."""
    lines = [f"{method} {path} HTTP/1.1", "Host: test", *headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + body


def mutant(seed: int, index: int) -> bytes:
    """Case `index`: a malformed (or by chance well-formed) request."""
    generator = random.Random(seed * 1_000_003 + index)
    path, body = generator.choice(BODIES)
    json_type = ["Content-Type: application/json"]
    kind = generator.choices(("fields", "json bytes", "headers", "http bytes", "routes"), (50, 20, 10, 15, 5))[0]
    if kind == "routes":
        data = json.dumps(body).encode() if generator.random() < 0.3 else b""
        headers = [*json_type, f"Content-Length: {len(data)}"]
        return wire(generator.choice(METHODS), generator.choice((*PATHS, path)), headers, data)
    text = json.dumps(change(body, generator) if kind == "fields" else body).encode()
    if kind == "json bytes":
        text = flip(text, generator)
    headers = [*json_type, f"Content-Length: {len(text)}"]
    if kind == "headers":
        for _ in range(generator.randrange(1, 4)):
            headers.insert(generator.randrange(len(headers) + 1), generator.choice(HEADERS))
    request = wire("POST", path, headers, text)
    return flip(request, generator) if kind == "http bytes" else request

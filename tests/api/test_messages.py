"""What errors say: the field, what would be right, what was sent; in JSON's words, not in Python's."""

from __future__ import annotations

from typing import Any

import pytest

from server.methods import METHODS
from tests.api.scripted_engine import check_envelope, make, open_client

COMPLETIONS, CHAT, SCORE, RERANK = "/v1/completions", "/v1/chat/completions", "/v1/score", "/v1/rerank"

*FIRST, LAST = METHODS
TEXT = {"type": "text", "text": "Hi"}

CASES: list[tuple[str, dict[str, Any], str]] = [
    (COMPLETIONS, {"temperature": 3}, "`temperature` must be less than or equal to 2 (got 3)"),
    (COMPLETIONS, {"temperature": "hot"}, "`temperature` must be a number (got 'hot')"),
    (COMPLETIONS, {"n": True}, "`n` must be an integer (got true)"),
    (COMPLETIONS, {"stream": 1}, "`stream` must be true or false (got 1)"),
    (COMPLETIONS, {"stop": 5}, "`stop` must be a string or a list of strings"),
    (COMPLETIONS, {"stop": [""]}, "`stop.0` must have at least 1 character (got '')"),
    (COMPLETIONS, {"stop": ["a"] * 5}, "`stop` must have at most 4 items, not 5"),
    (COMPLETIONS, {"guidance": 5}, "`guidance` must be a method's name or an object"),
    (
        COMPLETIONS,
        {"guidance": "best"},
        f"`guidance.method` must be {', '.join(map(repr, FIRST))} or {LAST!r} (got 'best')",
    ),
    (
        COMPLETIONS,
        {"guidance": {"method": "bon", "reward_model": "zz"}},
        "`guidance.reward_model` names 'zz', which is not loaded; loaded: rm",
    ),
    (COMPLETIONS, {"diffusion": []}, "`diffusion` must be an object"),
    (COMPLETIONS, {"frobnicate": 1}, "`frobnicate` is not a field of this request"),
    (CHAT, {"messages": []}, "`messages` must have at least 1 item, not 0"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": 5}]},
        "`messages.0.content` must be a string or a list of text parts",
    ),
    (CHAT, {"messages": [{"role": "user"}]}, "`messages.0.content` is required"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [TEXT, TEXT | {"cache_control": {"type": "ephemeral"}}]}]},
        "`messages.0.content` holds 'cache_control' in part 1; a text part has `type` and `text` only",
    ),
    (
        RERANK,
        {"documents": ["a", {"text": "b", "title": "c"}]},
        "`documents.1` holds 'title', which would not be read: a document is a string or its `text` alone",
    ),
    (COMPLETIONS, {"best_of": 200}, "`best_of` must be at most 128 on this server (got 200)"),
    (COMPLETIONS, {"prompt": ["Hi"] * 129}, "`prompt` must have at most 128 items on this server, not 129"),
    (COMPLETIONS, {"stream_canvas": True}, "`stream_canvas` needs `stream`"),
    (
        COMPLETIONS,
        {"guidance": {"method": "bon", "eta": 1}},
        "`guidance.eta` has no effect with method bon, which uses no gradient",
    ),
    (
        COMPLETIONS,
        {"diffusion": {"entropy_bound": 1}},
        "`diffusion.entropy_bound` has no effect with algorithm entropy",
    ),
    (SCORE, {"queries": 5}, "`queries` must be a prompt, a list of messages, or a list of those"),
    (SCORE, {"documents": 5}, "`documents` must be a string or a list of strings"),
    (RERANK, {"query": 5}, "`query` must be a prompt or a list of messages"),
]
"""A route, what is wrong in the request, and the message, which begins with the field."""
GOOD: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "Hi"},
    CHAT: {"messages": [{"role": "user", "content": "Hi"}]},
    SCORE: {"queries": "a", "documents": "b"},
    RERANK: {"query": "a", "documents": ["b"]},
}


@pytest.mark.parametrize(("path", "change", "message"), CASES)
async def test_messages(path: str, change: dict[str, Any], message: str) -> None:
    async with open_client(make()) as client:
        error = check_envelope(await client.post(path, json={**GOOD[path], **change}), 400)
    param = message.split("`")[1]
    assert error == {"message": message, "type": "invalid_request_error", "param": param, "code": "invalid_value"}


@pytest.mark.parametrize(
    ("path", "field", "value", "reason"),
    [
        (COMPLETIONS, "logprobs", 0, "left-to-right"),
        (COMPLETIONS, "logprobs", 5, "left-to-right"),
        (COMPLETIONS, "echo", True, "left-to-right"),
        (CHAT, "logprobs", True, "left-to-right"),
        (CHAT, "top_logprobs", 2, "left-to-right"),
        (CHAT, "frequency_penalty", 0.5, "left to right"),
        (CHAT, "logit_bias", {"5": 1}, "sampler"),
        (CHAT, "tools", [{"type": "function"}], "only writes text"),
        (CHAT, "min_tokens", 3, "ignore_eos"),
        ("/tokenize", "add_special_tokens", True, "as it stands"),
    ],
)
async def test_a_refused_field_says_why(path: str, field: str, value: object, reason: str) -> None:
    body = GOOD.get(path, {"prompt": "Hi"})
    async with open_client(make()) as client:
        error = check_envelope(await client.post(path, json={**body, field: value}), 400)
        assert error["param"] == field
        assert error["message"].startswith(f"`{field}` is not supported: ")
        assert reason in error["message"]
        nothing = {"echo": False, "frequency_penalty": 0, "logit_bias": {}, "tools": [], "add_special_tokens": False}
        for same in (None, nothing.get(field)):
            response = await client.post(path, json={**body, field: same})
            assert response.status_code == 200, response.text

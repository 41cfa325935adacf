"""Bad input: the right status, against a real server, and what the message says: the field, what would be right, what
was sent; in JSON's words, not in Python's."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import pytest

from server.methods import METHODS
from tests.api.scripted_engine import check_envelope, make, open_client

if TYPE_CHECKING:
    from tests.support.serving import Served

COMPLETIONS, CHAT, SCORE, RERANK = "/v1/completions", "/v1/chat/completions", "/v1/score", "/v1/rerank"
RESPONSES = "/v1/responses"
GOOD: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "Hi"},
    CHAT: {"messages": [{"role": "user", "content": "Hi"}]},
    SCORE: {"queries": "a", "documents": "b"},
    RERANK: {"query": "a", "documents": ["b"]},
    RESPONSES: {"input": "Hi"},
}

Wrong = list[tuple[str, list[Any], dict[str, Any]]]
"""A field's path, values that are wrong there, and what else the request has. The field is named in the error."""

ENTRGI, BON = {"guidance": {"method": "entrgi"}}, {"guidance": {"method": "bon"}}
RESAMPLED = {"guidance": {"resample": {}}, "n": 2}


def algorithm(name: str) -> dict[str, Any]:
    return {"diffusion": {"algorithm": name}}


FIELDS: Wrong = [
    ("prompt", [None, "", [], [[]], ["Hi", ""], 5, {"text": "Hi"}, ["Hi", 5], [1, "Hi"], [1.5], [True], [-1]], {}),
    ("prompt", [[512], [[1], [10**30]], "word " * 3000, ["Hi"] * 129, "\ud800"], {}),
    ("model", ["", 7], {}),
    ("max_tokens", [0, -3, 2.0, "8", True, 2049, 10**40], {}),
    ("temperature", [-0.1, 2.5, "hot", [0.7]], {}),
    ("top_p", [1.01, -0.5], {}),
    ("top_k", [-2, 1.5], {}),
    ("seed", [2**63, 1.25, True, [], [1, 2], ["1"]], {}),
    ("n", [0, 2**70, 129], {}),
    ("best_of", [2], {}),
    ("best_of", [2], {"n": 3, **BON}),
    ("best_of", [129], BON),
    ("best_of", [4], {"prompt": ["Hi"] * 40, **BON}),
    ("stop", [["a", "b", "c", "d", "e"], 5], {}),
    ("stop.0", ["", "x" * 1001], {"stop": [None]}),
    ("stop.1", [""], {"stop": ["a", None]}),
    ("stream", ["yes"], {}),
    ("stream_options", [{"include_usage": True}], {}),
    ("stream_options.include", [True], {"stream": True, "stream_options": {}}),
    ("stream_canvas", [True], {}),
    ("return_token_ids", [1], {}),
    ("ignore_eos", ["false"], {}),
    ("timeout", [0, 1e9], {}),
    ("suffix", [5], {}),
    ("chat_template", ["yes"], {}),
    ("chat_template", [True], {"prompt": [5, 6]}),
    ("chat_template_kwargs", [{"a": 1}], {}),
    ("chat_template_kwargs", ["a", {"a": [1]}], {"chat_template": True}),
    ("temprature", [0.5], {}),
    ("guided_regex", ["(a+)+$"], {}),
    ("bad_words", [["x"]], {}),
    ("response_format", [{"type": "json_schema", "json_schema": {}}], {}),
    ("max_completion_tokens", [4], {}),
    ("messages", [[]], {}),
    ("presence_penalty", [-1], {}),
    ("repetition_penalty", [1.1], {}),
    ("guidance", [3], {}),
    ("guidance.method", ["EntRGi"], {"guidance": {}}),
    ("guidance.reward_model", ["nobody", 3], ENTRGI),
    ("guidance.eta", [11, -1], ENTRGI),
    ("guidance.eta", [0.5], BON),
    ("guidance.eta", [0.5], {"guidance": {}}),
    ("guidance.gradient_steps", [17, 2.5], ENTRGI),
    ("guidance.gradient_steps", [3], {"guidance": {"method": "none"}}),
    ("guidance.strength", [1], ENTRGI),
    ("guidance.confidence", ["low"], ENTRGI),
    ("guidance.confidence", ["base"], ENTRGI | algorithm("origin")),
    ("guidance.start", [1.0], ENTRGI),
    ("guidance.stop", [0.5], {"guidance": {"method": "entrgi", "start": 0.5}}),
    ("guidance.every", [0], ENTRGI),
    ("guidance.reward_models", [[]], BON),
    ("guidance.reward_models", [[{"model": "rm"}]], {"guidance": {"method": "bon", "reward_model": "rm"}}),
    ("guidance.reward_models.0.model", ["x"], {"guidance": {"method": "bon", "reward_models": [{}]}}),
    ("guidance.reward_models.0.weight", [1e9], {"guidance": {"method": "bon", "reward_models": [{"model": "rm"}]}}),
    ("guidance.reward_models.1.model", ["rm"], {"guidance": {"method": "bon", "reward_models": [{"model": "rm"}, {}]}}),
    ("guidance.resample", [True, "reward", []], BON),
    ("guidance.resample.by", ["judge", 1], RESAMPLED),
    ("guidance.resample.every", [0, 1.5, "8"], RESAMPLED),
    ("guidance.resample.strength", [0, -1, 101], RESAMPLED),
    ("guidance.resample.potential", ["sum"], RESAMPLED),
    ("guidance.resample.threshold", [0, 1.01], RESAMPLED),
    ("guidance.resample.eta", [1], RESAMPLED),
    ("diffusion", ["fast"], {}),
    ("diffusion.steps", [0, 4096], {"diffusion": {}}),
    ("diffusion.algorithm", ["random"], {"diffusion": {}}),
    ("diffusion.entropy_bound", [-0.1, 1e4, "0.1"], algorithm("entropy_bound")),
    ("diffusion.entropy_bound", [0.1], algorithm("threshold")),
    ("diffusion.entropy_bound", [0.1], {"diffusion": {}}),
    ("diffusion.confidence_threshold", [-1, 1.5], algorithm("threshold")),
    ("diffusion.confidence_threshold", [0.9], {"diffusion": {}}),
    ("diffusion.algorithm_temperature", [-1], {"diffusion": {}}),
    *(("diffusion.algorithm_temperature", [1], algorithm(name)) for name in ("entropy_bound", "threshold", "origin")),
    ("diffusion.block_length", [5], {"max_tokens": 4, "diffusion": {}}),
    ("diffusion.schedule", ["cosine"], {"diffusion": {}}),
    ("diffusion.schedule", ["even"], algorithm("origin")),
    ("diffusion.deprioritize_eos", [True], algorithm("origin")),
    ("diffusion.cfg_scale", [-0.5, 1e300], {"diffusion": {}}),
    ("diffusion.temperature", [1], {"diffusion": {}}),
]
USER = {"role": "user", "content": "Hi"}
IMAGE = [{"type": "image_url", "image_url": {"url": "http://x"}}]
CHAT_FIELDS: Wrong = [
    ("messages", [None, [], "Hi", [{"role": "user", "content": "word " * 3000}]], {}),
    ("messages", [[{"role": "user", "content": ""}] * 5000, [{"role": "user", "content": "<" * 1_900_000}]], {}),
    ("messages.0", ["Hi"], {"messages": [None]}),
    ("messages.0.content", [None, 5, [], IMAGE, "\udfff"], {"messages": [USER]}),
    ("messages.0.role", [None, "wizard"], {"messages": [USER]}),
    ("messages.1.role", ["tool"], {"messages": [USER, {**USER}]}),
    ("messages.0.name", [5, "x" * 257, "\ud800"], {"messages": [USER]}),
    ("max_tokens", [4], {"max_completion_tokens": 8}),
    ("prompt", ["Hi"], {}),
    ("suffix", ["Hi"], {}),
    ("chat_template", ["{% for i in range(10**9) %}{% endfor %}"], {}),
    ("chat_template_kwargs", ["a", [1], {"a": [1]}, {"a": {}}, {"a": "x" * 8190}, {"a": "\udfff"}], {}),
    ("chat_template_kwargs", [{name: "x"} for name in ("messages", "add_generation_prompt", "eos_token")], {}),
    ("add_generation_prompt", ["yes", 1], {}),
    ("add_generation_prompt", [True], {"continue_final_message": True, "messages": [{**USER, "role": "assistant"}]}),
    ("continue_final_message", [1, True], {}),
    ("tool_choice", ["required"], {}),
    ("response_format.type", ["json_object"], {"response_format": {}}),
    ("reasoning_effort", ["high"], {}),
    ("service_tier", ["priority"], {}),
]
OUTPUT = {"type": "output_text", "text": "a"}
RESPONSES_FIELDS: Wrong = [
    ("input", [None, [], 5, [USER] * 5000, "word " * 3000, [{"type": "item_reference", "id": "msg_1"}]], {}),
    ("input.0.content", [None, 5, [], [{"type": "input_image", "image_url": "http://x"}]], {"input": [{**USER}]}),
    ("input.0.content", [[OUTPUT | {"annotations": [{}]}], [OUTPUT | {"logprobs": {}}]], {"input": [{**USER}]}),
    ("messages", [[USER]], {}),
    ("max_tokens", [4], {"max_output_tokens": 8}),
    ("max_output_tokens", [0, 2049], {}),
    ("n", [2], {}),
    ("text.format.type", ["json_schema", "json_object"], {"text": {"format": {}}}),
    ("stream_options.continuous_usage_stats", [True], {"stream": True, "stream_options": {}}),
    ("guidance.eta", [11], {"guidance": {"method": "entrgi"}}),
]


def cases(path: str, fields: Wrong) -> list[Any]:
    """(route, body, param) of every wrong value."""
    made = []
    for param, values, context in fields:
        for value in values:
            body = copy.deepcopy({**GOOD[path], **context})
            *parents, last = (int(part) if part.isdecimal() else part for part in param.split("."))
            place: Any = body
            for parent in parents:
                place = place[parent]
            place[last] = value
            made.append(pytest.param(path, body, param, id=f"{path} {param} {json.dumps(value)[:30]}"))
    return made


CASES = cases(COMPLETIONS, FIELDS) + cases(CHAT, CHAT_FIELDS) + cases(RESPONSES, RESPONSES_FIELDS)

BODIES: list[tuple[bytes, str]] = [
    (b"", "not JSON"),
    (b"{", "not JSON"),
    (b"nonsense", "not JSON"),
    (b'{"prompt": "Hi",}', "not JSON"),
    (b"[]", "request body"),
    (b'"Hi"', "request body"),
    (b"null", "request body"),
    (b'{"prompt": "Hi", "temperature": NaN}', "NaN"),
    (b'{"prompt": "Hi", "guidance": {"eta": Infinity}}', "Infinity"),
    (b'{"prompt": "Hi", "top_p": -Infinity}', "Infinity"),
    (b'{"prompt": "Hi", "temperature": 1e999}', "temperature"),
    (b'{"prompt": "Hi", "prompt": "Ho"}', "twice"),
    (b'{"prompt": "Hi", "seed": ' + b"9" * 5000 + b"}", "too long"),
    (b"[" * 200_000, "nested too deeply"),
    (b'{"a":' * 100_000, "nested too deeply"),
    (b"\xff\xfe{", "UTF-8"),
    ('{"prompt": "Hi"}'.encode("utf-16"), "UTF-8"),
]


def check(response: Any, status: int, param: str | None) -> None:
    error = check_envelope(response, status)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param, error
    assert len(error["message"]) <= 900
    assert "Traceback" not in error["message"]
    assert "site-packages" not in error["message"]
    assert param is None or f"`{param}`" in error["message"]


def send(server: Served, path: str, body: dict[str, Any]) -> Any:
    data = json.dumps(body)  # ASCII: lone surrogates travel as escapes
    return server.client.post(path, content=data, headers={"Content-Type": "application/json"})


@pytest.mark.parametrize(("path", "body", "param"), CASES)
def test_the_wrong_field_is_named(server: Served, path: str, body: dict[str, Any], param: str) -> None:
    check(send(server, path, body), 400, param)


def test_messages_quote_little(server: Served) -> None:
    check(send(server, COMPLETIONS, {**GOOD[COMPLETIONS], "x" * 5000: 1}), 400, "x" * 197 + "...")
    for model in ("no-such-model", "rm", "secret" * 20):
        response = send(server, COMPLETIONS, {**GOOD[COMPLETIONS], "model": model})
        check(response, 404, "model")
        assert len(response.content) < 400
    big = send(server, COMPLETIONS, {**GOOD[COMPLETIONS], "temperature": "y" * 1_000_000})
    check(big, 400, "temperature")
    assert len(big.content) < 1000


@pytest.mark.parametrize(("body", "part"), BODIES, ids=range(len(BODIES)))
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, SCORE, "/tokenize"])
def test_body(server: Served, path: str, body: bytes, part: str) -> None:
    response = server.client.post(path, content=body, headers={"Content-Type": "application/json"})
    error = check_envelope(response, 400)
    assert error["type"] == "invalid_request_error"
    # The other routes have other fields; there the first unknown one is named instead.
    if path == COMPLETIONS:
        assert part in error["message"]
    assert len(error["message"]) < 900


@pytest.mark.parametrize("stream", [False, True])
def test_long_conversation_for_the_reward_model_names_the_prompt(server: Served, stream: bool) -> None:
    """Fits the diffusion model's context but not the reward model's, whose template is longer: the worker knows."""
    info = {model["id"]: model for model in server.client.get("/v1/models").json()["data"]}
    room = info["dlm"]["context_length"] - 4
    tokens = server.post("/tokenize", {"prompt": "a"}).json()["tokens"]
    body = {"prompt": tokens * room, "max_tokens": 4, "guidance": "bon", "best_of": 1, "stream": stream}
    check(send(server, COMPLETIONS, body), 400, "prompt")


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        (SCORE, {"queries": "a", "documents": []}, 400, "documents"),
        (SCORE, {"queries": ["a", "b"], "documents": ["c"]}, 400, "documents"),
        (SCORE, {"queries": "a", "documents": "b", "model": "dlm"}, 404, "model"),
        (SCORE, {"documents": "b"}, 400, "queries"),
        (SCORE, {"queries": "a", "documents": ["b"] * 1025}, 400, "documents"),
        (SCORE, {"queries": "a", "documents": "b " * 9000}, 400, "documents"),
        (SCORE, {"queries": [[{"role": "x", "content": "a"}]], "documents": "b"}, 400, "queries.0.0.role"),
        (SCORE, {"queries": "word " * 20_000, "documents": ["a"] * 1000}, 400, "documents"),
        (RERANK, {"query": "word " * 20_000, "documents": ["a"] * 1000}, 400, "documents"),
        (RERANK, {"query": "a", "documents": "b"}, 400, "documents"),
        (RERANK, {"query": "a", "documents": ["b"], "top_n": -1}, 400, "top_n"),
        (RERANK, {"query": ["a"], "documents": ["b"]}, 400, "query.0"),
        (RERANK, {"query": "a", "documents": [{"text": 5}]}, 400, "documents.0"),
        ("/v2/rerank", {"query": "a", "documents": ["b"], "max_tokens_per_doc": 9}, 400, "max_tokens_per_doc"),
        ("/rerank", {"query": "a", "documents": ["b"], "model": "dlm"}, 404, "model"),
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, 400, "add_generation_prompt"),
        ("/tokenize", {"prompt": "a", "model": "gpt"}, 404, "model"),
        ("/detokenize", {"tokens": [1, 512]}, 400, "tokens.1"),
        ("/detokenize", {"tokens": ["a"]}, 400, "tokens.0"),
        ("/detokenize", {"tokens": "a"}, 400, "tokens"),
    ],
)
def test_other_routes(server: Served, path: str, body: dict[str, Any], status: int, param: str) -> None:
    check(send(server, path, body), status, param)


# -- what the messages say ---------------------------------------------------------------------------------------

*FIRST, LAST = METHODS
BON = {"method": "bon"}
TEXT = {"type": "text", "text": "Hi"}
CACHED = {**TEXT, "cache_control": {"type": "ephemeral"}}
TITLED = ["a", {"text": "b", "title": "c"}]


def said(content: object) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


MESSAGES: dict[str, list[tuple[dict[str, Any], str]]] = {
    COMPLETIONS: [
        ({"temperature": 3}, "`temperature` must be less than or equal to 2 (got 3)"),
        ({"temperature": "hot"}, "`temperature` must be a number (got 'hot')"),
        ({"n": True}, "`n` must be an integer (got true)"),
        ({"stream": 1}, "`stream` must be true or false (got 1)"),
        ({"stop": 5}, "`stop` must be a string or a list of strings"),
        ({"stop": [""]}, "`stop.0` must have at least 1 character (got '')"),
        ({"stop": ["a"] * 5}, "`stop` must have at most 4 items, not 5"),
        ({"guidance": 5}, "`guidance` must be a method's name or an object"),
        ({"guidance": "best"}, f"`guidance.method` must be {', '.join(map(repr, FIRST))} or {LAST!r} (got 'best')"),
        ({"guidance": {"reward_model": "z"}}, "`guidance.reward_model` names 'z', which is not loaded; loaded: rm"),
        ({"guidance": BON | {"eta": 1}}, "`guidance.eta` has no effect with method bon, which uses no gradient"),
        (
            {"guidance": BON | {"resample": {"by": "confidence", "potential": "difference"}}},
            "`guidance.resample.potential` has no effect with by confidence",
        ),
        (
            {"guidance": "smc", "best_of": 1},
            "`best_of` is 1, and `guidance.resample` needs at least 2 trajectories (with method none as many `n`)",
        ),
        (
            {"guidance": "smc", "temperature": 0},
            "`temperature` 0 would keep the copies that `guidance.resample` makes the same: it must be above 0, or "
            "`diffusion.algorithm_temperature` must be",
        ),
        ({"diffusion": []}, "`diffusion` must be an object"),
        ({"diffusion": {"entropy_bound": 1}}, "`diffusion.entropy_bound` has no effect with algorithm entropy"),
        ({"frobnicate": 1}, "`frobnicate` is not a field of this request"),
        ({"best_of": 200}, "`best_of` must be at most 128 on this server (got 200)"),
        ({"prompt": ["Hi"] * 129}, "`prompt` must have at most 128 items on this server, not 129"),
        ({"stream_canvas": True}, "`stream_canvas` needs `stream`"),
    ],
    CHAT: [
        ({"messages": []}, "`messages` must have at least 1 item, not 0"),
        (said(5), "`messages.0.content` must be a string or a list of text parts"),
        ({"messages": [{"role": "user"}]}, "`messages.0.content` is required"),
        (
            said([TEXT, CACHED]),
            "`messages.0.content` holds 'cache_control' in part 1; a text part has `type` and `text` only",
        ),
    ],
    SCORE: [
        ({"queries": 5}, "`queries` must be a prompt, a list of messages, or a list of those"),
        ({"documents": 5}, "`documents` must be a string or a list of strings"),
    ],
    RERANK: [
        ({"query": 5}, "`query` must be a prompt or a list of messages"),
        (
            {"documents": TITLED},
            "`documents.1` holds 'title', which would not be read: a document is a string or its `text` alone",
        ),
    ],
}
"""By route: what is wrong in the request, and the message, which begins with the field."""


@pytest.mark.parametrize(
    ("path", "change", "message"), [(path, *case) for path, cases in MESSAGES.items() for case in cases]
)
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
        (RESPONSES, "store", True, "nothing is kept"),
        (RESPONSES, "previous_response_id", "resp_1", "whole conversation"),
        (RESPONSES, "conversation", "conv_1", "whole conversation"),
        (RESPONSES, "background", True, "nothing is kept"),
        (RESPONSES, "tools", [{"type": "web_search"}], "only writes text"),
        (RESPONSES, "tool_choice", "required", "only writes text"),
        (RESPONSES, "reasoning", {"effort": "low"}, "only text"),
        (RESPONSES, "include", ["message.output_text.logprobs"], "only text"),
        (RESPONSES, "truncation", "auto", "never cut"),
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

"""Bad input against a real server: the right status, a message that names the field, and the server goes on."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.support.serving import Served

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
GOOD = {"prompt": "Hi", "max_tokens": 4}
GOOD_CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}

Wrong = list[tuple[str, list[Any], dict[str, Any]]]
"""A field's path, values that are wrong there, and what else the request has. The field is named in the error."""

ENTRGI, BON = {"guidance": {"method": "entrgi"}}, {"guidance": {"method": "bon"}}


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
    ("seed", [2**63, 1.25], {}),
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
    ("temprature", [0.5], {}),
    ("max_completion_tokens", [4], {}),
    ("messages", [[]], {}),
    # What a masked model cannot honour.
    ("echo", [True], {}),
    ("logprobs", [0, 1], {}),
    ("logit_bias", [{"5": 1}], {}),
    ("frequency_penalty", [0.5], {}),
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
    ("diffusion.block_length", [5], {"diffusion": {}}),
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
    ("messages.0", ["Hi"], {"messages": [None]}),
    ("messages.0.content", [None, 5, [], IMAGE, "\udfff"], {"messages": [USER]}),
    ("messages.0.role", [None, "wizard"], {"messages": [USER]}),
    ("messages.1.role", ["tool"], {"messages": [USER, {**USER}]}),
    ("messages.0.name", ["Bob"], {"messages": [USER]}),
    ("max_tokens", [4], {"max_completion_tokens": 8}),
    ("prompt", ["Hi"], {}),
    ("suffix", ["Hi"], {}),
    ("tools", [[{"type": "function"}]], {}),
    ("tool_choice", ["required"], {}),
    ("response_format.type", ["json_object"], {"response_format": {}}),
    ("logprobs", [True], {}),
    ("top_logprobs", [3], {}),
    ("reasoning_effort", ["high"], {}),
    ("service_tier", ["priority"], {}),
]


def cases(path: str, good: dict[str, Any], fields: Wrong) -> list[Any]:
    """(route, body, param) of every wrong value."""
    made = []
    for param, values, context in fields:
        for value in values:
            body = copy.deepcopy({**good, **context})
            *parents, last = (int(part) if part.isdecimal() else part for part in param.split("."))
            place: Any = body
            for parent in parents:
                place = place[parent]
            place[last] = value
            made.append(pytest.param(path, body, param, id=f"{path} {param} {json.dumps(value)[:30]}"))
    return made


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
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param, error
    assert error["code"] is None or isinstance(error["code"], str)
    assert len(error["message"]) <= 900
    assert "Traceback" not in error["message"]
    assert "site-packages" not in error["message"]
    assert param is None or f"`{param}`" in error["message"]


def send(server: Served, path: str, body: dict[str, Any]) -> Any:
    data = json.dumps(body)  # ASCII: lone surrogates travel as escapes
    return server.client.post(path, content=data, headers={"Content-Type": "application/json"})


@pytest.mark.parametrize(
    ("path", "body", "param"), cases(COMPLETIONS, GOOD, FIELDS) + cases(CHAT, GOOD_CHAT, CHAT_FIELDS)
)
def test_the_wrong_field_is_named(server: Served, path: str, body: dict[str, Any], param: str) -> None:
    check(send(server, path, body), 400, param)


def test_an_unknown_name_is_repeated_only_in_part(server: Served) -> None:
    check(send(server, COMPLETIONS, {**GOOD, "x" * 5000: 1}), 400, "x" * 197 + "...")
    for model in ("no-such-model", "rm"):
        check(send(server, COMPLETIONS, {**GOOD, "model": model}), 404, "model")


@pytest.mark.parametrize(("body", "part"), BODIES, ids=range(len(BODIES)))
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/v1/score", "/tokenize"])
def test_body(server: Served, path: str, body: bytes, part: str) -> None:
    response = server.client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    # The other routes have other fields; there the first unknown one is named instead.
    if path == COMPLETIONS:
        assert part in error["message"]
    assert len(error["message"]) < 900


def test_messages_quote_little(server: Served) -> None:
    response = send(server, COMPLETIONS, {**GOOD, "model": "secret" * 20})
    assert len(response.json()["error"]["message"]) < 400
    big = send(server, COMPLETIONS, {**GOOD, "temperature": "y" * 1_000_000})
    assert big.status_code == 400
    assert len(big.content) < 1000


def test_long_conversation_for_the_reward_model_names_the_prompt(server: Served) -> None:
    """Fits the diffusion model's context but not the reward model's, whose template is longer."""
    info = {model["id"]: model for model in server.client.get("/v1/models").json()["data"]}
    room = info["dlm"]["context_length"] - 4
    tokens = server.post("/tokenize", {"prompt": "a"}).json()["tokens"]
    response = send(server, COMPLETIONS, {"prompt": tokens * room, "max_tokens": 4, "guidance": "bon", "best_of": 1})
    check(response, 400, "prompt")


def test_the_server_goes_on(server: Served) -> None:
    response = server.post(COMPLETIONS, {**GOOD, "guidance": "entrgi", "best_of": 2})
    assert response.status_code == 200
    assert isinstance(response.json()["choices"][0]["reward"], float)


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/v1/score", {"queries": "a", "documents": []}, 400, "documents"),
        ("/v1/score", {"queries": ["a", "b"], "documents": ["c"]}, 400, "documents"),
        ("/v1/score", {"queries": "a", "documents": "b", "model": "dlm"}, 404, "model"),
        ("/v1/score", {"documents": "b"}, 400, "queries"),
        ("/v1/score", {"queries": "a", "documents": ["b"] * 1025}, 400, "documents"),
        ("/v1/score", {"queries": "a", "documents": "b " * 9000}, 400, "documents"),
        ("/v1/score", {"queries": [[{"role": "x", "content": "a"}]], "documents": "b"}, 400, "queries.0.0.role"),
        ("/v1/rerank", {"query": "a", "documents": "b"}, 400, "documents"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "top_n": -1}, 400, "top_n"),
        ("/v1/rerank", {"query": ["a"], "documents": ["b"]}, 400, "query.0"),
        ("/v1/rerank", {"query": "a", "documents": [{"text": 5}]}, 400, "documents.0"),
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

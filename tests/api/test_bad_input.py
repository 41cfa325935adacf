"""Bad input against a real server: the right status, a message that names the field, and the server goes on."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.support.serving import Served

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
GOOD = {"prompt": "Hi", "max_tokens": 4}
GOOD_CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}

# (changes to a good completion request, status, param)
FIELDS: list[tuple[dict[str, Any], int, str | None]] = [
    ({"prompt": None}, 400, "prompt"),
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": []}, 400, "prompt"),
    ({"prompt": [[]]}, 400, "prompt"),
    ({"prompt": ["Hi", ""]}, 400, "prompt"),
    ({"prompt": 5}, 400, "prompt"),
    ({"prompt": {"text": "Hi"}}, 400, "prompt"),
    ({"prompt": ["Hi", 5]}, 400, "prompt"),
    ({"prompt": [1, "Hi"]}, 400, "prompt"),
    ({"prompt": [1.5]}, 400, "prompt"),
    ({"prompt": [True]}, 400, "prompt"),
    ({"prompt": [-1]}, 400, "prompt"),
    ({"prompt": [512]}, 400, "prompt"),
    ({"prompt": [[1], [10**30]]}, 400, "prompt"),
    ({"prompt": "word " * 3000}, 400, "prompt"),
    ({"prompt": ["Hi"] * 129}, 400, "prompt"),
    ({"prompt": "\ud800"}, 400, "prompt"),
    ({"model": "no-such-model"}, 404, "model"),
    ({"model": "rm"}, 404, "model"),
    ({"model": ""}, 400, "model"),
    ({"model": 7}, 400, "model"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": -3}, 400, "max_tokens"),
    ({"max_tokens": 2.0}, 400, "max_tokens"),
    ({"max_tokens": "8"}, 400, "max_tokens"),
    ({"max_tokens": True}, 400, "max_tokens"),
    ({"max_tokens": 2049}, 400, "max_tokens"),
    ({"max_tokens": 10**40}, 400, "max_tokens"),
    ({"temperature": -0.1}, 400, "temperature"),
    ({"temperature": 2.5}, 400, "temperature"),
    ({"temperature": "hot"}, 400, "temperature"),
    ({"temperature": [0.7]}, 400, "temperature"),
    ({"top_p": 1.01}, 400, "top_p"),
    ({"top_p": -0.5}, 400, "top_p"),
    ({"top_k": -2}, 400, "top_k"),
    ({"top_k": 1.5}, 400, "top_k"),
    ({"seed": 2**63}, 400, "seed"),
    ({"seed": 1.25}, 400, "seed"),
    ({"n": 0}, 400, "n"),
    ({"n": 2**70}, 400, "n"),
    ({"n": 129}, 400, "n"),
    ({"n": 3, "best_of": 2, "guidance": "bon"}, 400, "best_of"),
    ({"best_of": 2}, 400, "best_of"),
    ({"best_of": 129, "guidance": "bon"}, 400, "best_of"),
    ({"prompt": ["Hi"] * 40, "best_of": 4, "guidance": "bon"}, 400, "best_of"),
    ({"stop": ["a", "b", "c", "d", "e"]}, 400, "stop"),
    ({"stop": ""}, 400, "stop.0"),
    ({"stop": ["a", ""]}, 400, "stop.1"),
    ({"stop": 5}, 400, "stop"),
    ({"stop": "x" * 1001}, 400, "stop.0"),
    ({"stream": "yes"}, 400, "stream"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    ({"stream": True, "stream_options": {"include": True}}, 400, "stream_options.include"),
    ({"stream_canvas": True}, 400, "stream_canvas"),
    ({"return_token_ids": 1}, 400, "return_token_ids"),
    ({"ignore_eos": "false"}, 400, "ignore_eos"),
    ({"timeout": 0}, 400, "timeout"),
    ({"timeout": 1e9}, 400, "timeout"),
    ({"suffix": 5}, 400, "suffix"),
    ({"chat_template": "yes"}, 400, "chat_template"),
    ({"chat_template": True, "prompt": [5, 6]}, 400, "chat_template"),
    ({"temprature": 0.5}, 400, "temprature"),
    ({"x" * 5000: 1}, 400, "x" * 197 + "..."),
    ({"max_completion_tokens": 4}, 400, "max_completion_tokens"),
    ({"messages": []}, 400, "messages"),
    # What a masked model cannot honour.
    ({"echo": True}, 400, "echo"),
    ({"logprobs": 1}, 400, "logprobs"),
    ({"logprobs": 0}, 400, "logprobs"),
    ({"logit_bias": {"5": 1}}, 400, "logit_bias"),
    ({"frequency_penalty": 0.5}, 400, "frequency_penalty"),
    ({"presence_penalty": -1}, 400, "presence_penalty"),
    ({"repetition_penalty": 1.1}, 400, "repetition_penalty"),
    # guidance
    ({"guidance": "entropy"}, 400, "guidance.method"),
    ({"guidance": 3}, 400, "guidance"),
    ({"guidance": {"method": "EntRGi"}}, 400, "guidance.method"),
    ({"guidance": {"method": "entrgi", "reward_model": "nobody"}}, 400, "guidance.reward_model"),
    ({"guidance": {"method": "entrgi", "reward_model": 3}}, 400, "guidance.reward_model"),
    ({"guidance": {"method": "entrgi", "eta": 11}}, 400, "guidance.eta"),
    ({"guidance": {"method": "entrgi", "eta": -1}}, 400, "guidance.eta"),
    ({"guidance": {"method": "entrgi", "gradient_steps": 17}}, 400, "guidance.gradient_steps"),
    ({"guidance": {"method": "entrgi", "gradient_steps": 2.5}}, 400, "guidance.gradient_steps"),
    ({"guidance": {"method": "entrgi", "strength": 1}}, 400, "guidance.strength"),
    ({"guidance": {"method": "entrgi", "confidence": "low"}}, 400, "guidance.confidence"),
    ({"guidance": {"method": "entrgi", "start": 0.5, "stop": 0.5}}, 400, "guidance.stop"),
    ({"guidance": {"method": "entrgi", "start": 1.0}}, 400, "guidance.start"),
    ({"guidance": {"method": "entrgi", "every": 0}}, 400, "guidance.every"),
    ({"guidance": {"method": "bon", "eta": 0.5}}, 400, "guidance.eta"),
    ({"guidance": {"method": "none", "gradient_steps": 3}}, 400, "guidance.gradient_steps"),
    ({"guidance": {"eta": 0.5}}, 400, "guidance.eta"),
    ({"guidance": {"method": "bon", "reward_models": []}}, 400, "guidance.reward_models"),
    (
        {"guidance": {"method": "bon", "reward_models": [{"model": "rm"}, {"model": "rm"}]}},
        400,
        "guidance.reward_models.1.model",
    ),
    ({"guidance": {"method": "bon", "reward_models": [{"model": "x"}]}}, 400, "guidance.reward_models.0.model"),
    (
        {"guidance": {"method": "bon", "reward_models": [{"model": "rm", "weight": 1e9}]}},
        400,
        "guidance.reward_models.0.weight",
    ),
    (
        {"guidance": {"method": "bon", "reward_model": "rm", "reward_models": [{"model": "rm"}]}},
        400,
        "guidance.reward_models",
    ),
    (
        {"guidance": {"method": "aps", "confidence": "base"}, "diffusion": {"algorithm": "origin"}},
        400,
        "guidance.confidence",
    ),
    # diffusion
    ({"diffusion": "fast"}, 400, "diffusion"),
    ({"diffusion": {"steps": 0}}, 400, "diffusion.steps"),
    ({"diffusion": {"steps": 4096}}, 400, "diffusion.steps"),
    ({"diffusion": {"algorithm": "random"}}, 400, "diffusion.algorithm"),
    ({"diffusion": {"algorithm": "entropy_bound", "entropy_bound": -0.1}}, 400, "diffusion.entropy_bound"),
    ({"diffusion": {"algorithm": "entropy_bound", "entropy_bound": 1e4}}, 400, "diffusion.entropy_bound"),
    ({"diffusion": {"algorithm": "entropy_bound", "entropy_bound": "0.1"}}, 400, "diffusion.entropy_bound"),
    ({"diffusion": {"algorithm": "threshold", "confidence_threshold": -1}}, 400, "diffusion.confidence_threshold"),
    ({"diffusion": {"algorithm": "threshold", "confidence_threshold": 1.5}}, 400, "diffusion.confidence_threshold"),
    ({"diffusion": {"algorithm": "threshold", "entropy_bound": 0.1}}, 400, "diffusion.entropy_bound"),
    (
        {"diffusion": {"algorithm": "entropy_bound", "algorithm_temperature": 1}},
        400,
        "diffusion.algorithm_temperature",
    ),
    ({"diffusion": {"algorithm": "threshold", "algorithm_temperature": 1}}, 400, "diffusion.algorithm_temperature"),
    ({"diffusion": {"entropy_bound": 0.1}}, 400, "diffusion.entropy_bound"),
    ({"diffusion": {"confidence_threshold": 0.9}}, 400, "diffusion.confidence_threshold"),
    ({"diffusion": {"algorithm_temperature": -1}}, 400, "diffusion.algorithm_temperature"),
    ({"diffusion": {"block_length": 5}}, 400, "diffusion.block_length"),
    ({"diffusion": {"schedule": "cosine"}}, 400, "diffusion.schedule"),
    ({"diffusion": {"cfg_scale": -0.5}}, 400, "diffusion.cfg_scale"),
    ({"diffusion": {"cfg_scale": 1e300}}, 400, "diffusion.cfg_scale"),
    ({"diffusion": {"algorithm": "origin", "deprioritize_eos": True}}, 400, "diffusion.deprioritize_eos"),
    ({"diffusion": {"algorithm": "origin", "schedule": "even"}}, 400, "diffusion.schedule"),
    ({"diffusion": {"algorithm": "origin", "algorithm_temperature": 1}}, 400, "diffusion.algorithm_temperature"),
    ({"diffusion": {"temperature": 1}}, 400, "diffusion.temperature"),
]

CHAT_FIELDS: list[tuple[dict[str, Any], int, str | None]] = [
    ({"messages": None}, 400, "messages"),
    ({"messages": []}, 400, "messages"),
    ({"messages": "Hi"}, 400, "messages"),
    ({"messages": ["Hi"]}, 400, "messages.0"),
    ({"messages": [{"role": "user"}]}, 400, "messages.0.content"),
    ({"messages": [{"content": "Hi"}]}, 400, "messages.0.role"),
    ({"messages": [{"role": "wizard", "content": "Hi"}]}, 400, "messages.0.role"),
    ({"messages": [{"role": "user", "content": "Hi"}, {"role": "tool", "content": "x"}]}, 400, "messages.1.role"),
    ({"messages": [{"role": "user", "content": 5}]}, 400, "messages.0.content"),
    ({"messages": [{"role": "user", "content": None}]}, 400, "messages.0.content"),
    ({"messages": [{"role": "user", "content": []}]}, 400, "messages.0.content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
        400,
        "messages.0.content",
    ),
    ({"messages": [{"role": "user", "content": "Hi", "name": "Bob"}]}, 400, "messages.0.name"),
    ({"messages": [{"role": "user", "content": "\udfff"}]}, 400, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "word " * 3000}]}, 400, "messages"),
    ({"max_completion_tokens": 8}, 400, "max_tokens"),
    ({"prompt": "Hi"}, 400, "prompt"),
    ({"suffix": "Hi"}, 400, "suffix"),
    ({"tools": [{"type": "function"}]}, 400, "tools"),
    ({"tool_choice": "required"}, 400, "tool_choice"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format.type"),
    ({"logprobs": True}, 400, "logprobs"),
    ({"top_logprobs": 3}, 400, "top_logprobs"),
    ({"reasoning_effort": "high"}, 400, "reasoning_effort"),
    ({"service_tier": "priority"}, 400, "service_tier"),
]

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


def name(case: tuple[dict[str, Any], int, str | None]) -> str:
    return json.dumps(case[0])[:60]


def send(server: Served, path: str, body: dict[str, Any]) -> Any:
    data = json.dumps(body)  # ASCII: lone surrogates travel as escapes
    return server.client.post(path, content=data, headers={"Content-Type": "application/json"})


@pytest.mark.parametrize(("change", "status", "param"), FIELDS, ids=map(name, FIELDS))
def test_completion_field(server: Served, change: dict[str, Any], status: int, param: str | None) -> None:
    check(send(server, COMPLETIONS, {**GOOD, **change}), status, param)


@pytest.mark.parametrize(("change", "status", "param"), CHAT_FIELDS, ids=map(name, CHAT_FIELDS))
def test_chat_field(server: Served, change: dict[str, Any], status: int, param: str | None) -> None:
    check(send(server, CHAT, {**GOOD_CHAT, **change}), status, param)


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

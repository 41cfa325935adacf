"""What a client can learn: `/v1/models`, under every name of the model, and the OpenAPI document."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api.fields import CompletionRequest, Diffusion
from server.api.guidance import Guidance
from server.methods import METHODS
from server.types import EngineInfo
from tests.api.scripted_engine import GOLDEN, INFO, ScriptedEngine, at_once, check_envelope, make, open_client


def ok(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


async def test_a_model_answers_to_all_its_names() -> None:
    async with open_client(make(served_model_name=["dlm", "also", "org/also"])) as client:
        listed = ok(await client.get("/v1/models"))["data"]
        roots = {model["id"]: model["root"] for model in listed}
        assert roots == {"dlm": "dlm", "also": "dlm", "org/also": "dlm", "rm": "rm"}
        for entry in listed:
            assert ok(await client.get(f"/v1/models/{entry['id']}")) == entry
        for name in ("dlm", "also", "org/also"):
            answer = ok(await client.post("/v1/completions", json={"model": name, "prompt": "Hi"}))
            assert answer["model"] == "dlm"
            assert ok(await client.post("/tokenize", json={"model": name, "prompt": "Hi"}))["count"] > 0
            assert ok(await client.post("/detokenize", json={"model": name, "tokens": [43]}))["prompt"]
        assert (await client.get("/v1/models/nobody")).status_code == 404
        for name in ("DLM", "al", "rm"):
            error = check_envelope(await client.post("/v1/completions", json={"model": name, "prompt": "Hi"}), 404)
            assert error["param"] == "model"


A2D = replace(
    INFO.model,
    diffusion_defaults={"algorithm": "maskgit_plus", "schedule": "even", "block_length": 32},
    template_arguments={"enable_thinking": False},
)


@pytest.mark.parametrize("info", [INFO, replace(INFO, model=A2D)], ids=["dream", "a2d"])
async def test_defaults_are_those_of_a_request_that_names_none(info: EngineInfo) -> None:
    """Sent back explicitly, each of them changes nothing."""
    app = make(ScriptedEngine(at_once, info=info), max_trajectories=6, max_score_pairs=7, request_timeout=9)
    async with open_client(app) as client:
        model, reward = ok(await client.get("/v1/models"))["data"]
    assert model["chat"] is True
    assert (model["type"], reward["type"]) == ("diffusion", "reward")
    assert model["algorithms"][-2:] == ["entropy_bound", "threshold"]
    assert (model["vocab_coverage"], reward["vocab_coverage"]) == (None, 1.0)
    sizes = {"canvas_tokens": 16_384, "guided_rows": 8_192, "reward_tokens": 65_536}
    assert model["limits"] == {"trajectories": 6, "score_pairs": 7} | sizes
    assert reward["defaults"] is reward["limits"] is reward["chat"] is None
    defaults = model["defaults"]
    assert defaults["timeout"] == 9
    assert defaults["reward_model"] == "rm"
    assert set(defaults["best_of"]) == set(METHODS)
    fields = {*CompletionRequest.model_fields, *Guidance.model_fields, *Diffusion.model_fields}
    assert set(defaults) <= fields
    documented = app.openapi()["components"]["schemas"]["Diffusion"]["properties"]
    for name, value in info.model.diffusion_defaults.items():
        assert documented[name]["default"] == value
        assert defaults[name] == (8 if name == "block_length" else value)  # the whole canvas
    assert defaults.pop("chat_template_kwargs", {}) == info.model.template_arguments
    guidance = {key: defaults[key] for key in Guidance.model_fields if key in defaults}
    diffusion = {key: defaults[key] for key in Diffusion.model_fields if key in defaults}
    top = {key: value for key, value in defaults.items() if key not in {*guidance, *diffusion, "best_of", "guidance"}}
    own = ("entropy_bound", "confidence_threshold")  # each belongs to an algorithm that is not the default
    body = {"prompt": "Hi", "seed": 1, **top, "guidance": {"method": "entrgi", **guidance}}
    body["diffusion"] = {key: value for key, value in diffusion.items() if key not in own}
    if info.model.diffusion_defaults:
        del body["guidance"]["confidence"]  # of another algorithm too
    engine = ScriptedEngine(at_once, info=info)
    async with open_client(make(engine, request_timeout=9)) as client:
        ok(await client.post("/v1/completions", json=body))
        ok(await client.post("/v1/completions", json={"prompt": "Hi", "seed": 1, "guidance": "entrgi"}))
    explicit, implicit = engine.jobs
    for block in ("sampling", "diffusion", "guidance"):
        assert getattr(explicit, block) == getattr(implicit, block)
    assert implicit.diffusion.algorithm == info.model.diffusion_defaults.get("algorithm", "entropy")


async def test_a_familys_template_arguments_hold_where_a_request_has_none(tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDEN / "dlm", tmp_path / "dlm")
    (folder / "chat_template.jinja").write_text("{{ enable_thinking }}{{ tone }}{{ messages[0].content }}")
    engine = ScriptedEngine(at_once, info=replace(INFO, model=replace(A2D, tokenizer_path=str(folder))))
    spoken = {"messages": [{"role": "user", "content": "Hi"}]}
    async with open_client(make(engine)) as client:
        for arguments, text in ((None, "FalseHi"), ({"tone": "dry"}, "FalsedryHi"), ({"enable_thinking": 1}, "1Hi")):
            asked: dict[str, Any] = {"chat_template_kwargs": arguments}
            ok(await client.post("/v1/chat/completions", json=spoken | asked))
            ok(await client.post("/v1/completions", json={"prompt": "Hi", "chat_template": True, **asked}))
            tokens = ok(await client.post("/tokenize", json=spoken | asked))["tokens"]
            assert ok(await client.post("/detokenize", json={"tokens": tokens}))["prompt"] == text
            assert [list(job.prompt_ids) for job in engine.jobs[-2:]] == [tokens, tokens]


async def test_openapi_is_complete() -> None:
    app = make()
    document = app.openapi()
    for reference in re.findall(r'"\$ref": "#/components/schemas/([^"]+)"', json.dumps(document)):
        assert reference in document["components"]["schemas"]
    for name, schema in document["components"]["schemas"].items():
        for field, about in schema.get("properties", {}).items():
            assert about.get("description"), f"{name}.{field} says nothing of itself"
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert "422" not in operation["responses"], path
            assert ("requestBody" in operation) == (method == "post")
            for status, response in operation["responses"].items():
                if status != "200":
                    schema = response["content"]["application/json"]["schema"]
                    assert schema == {"$ref": "#/components/schemas/ErrorEnvelope"}
    assert "text/event-stream" in document["paths"]["/v1/completions"]["post"]["responses"]["200"]["content"]
    async with open_client(app) as client:
        assert (await client.get("/openapi.json")).json() == document
        for path in ("/docs", "/redoc"):  # FastAPI's would load scripts from elsewhere
            assert (await client.get(path)).status_code == 404

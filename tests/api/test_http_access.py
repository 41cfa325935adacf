"""Who may come in, and what a request is called: keys, prefixes, origins, header limits, ids."""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path

import pytest

from tests.api.scripted_engine import KEYS, check_envelope, make, open_client, operations, routes


async def test_every_route_is_guarded() -> None:
    app = make(api_key=KEYS)
    found = {(method, path.replace("{model_id:path}", "dlm")) for method, path in routes(app)}
    assert found == set(operations(app)) | {("GET", "/openapi.json")}
    open_paths = {"/health", "/ready", "/ping"}
    async with open_client(app) as client:
        for method, path in found:
            for headers in ({}, {"Authorization": "Bearer wrong-key-0000"}, {"Authorization": f"Basic {KEYS[0]}"}):
                response = await client.request(method, path, headers=headers)
                if path in open_paths:
                    assert response.status_code == 200
                else:
                    error = check_envelope(response, 401)
                    assert error["code"] == "invalid_api_key"
                    assert response.headers["www-authenticate"].startswith("Bearer")
            for key in KEYS:
                response = await client.request(method, path, headers={"Authorization": f"bearer {key}"})
                assert response.status_code not in (401, 403)
        for path in {path for _, path in found} - open_paths:
            for method in ("HEAD", "OPTIONS", "PUT", "PATCH", "DELETE", "TRACE", "BREW"):
                response = await client.request(method, path)
                assert response.status_code == 401, (method, path)
                assert "x-request-id" in response.headers
        for path in ("/nowhere", "/health/", "//health", "/HEALTH", "/v1/%2e%2e/health"):
            assert (await client.get(path)).status_code == 401


async def test_wrong_keys() -> None:
    async with open_client(make(api_key=KEYS)) as client:
        for value in ("", "Bearer", "Bearer ", KEYS[0], f"Bearer {KEYS[0]}x", f"Bearer {KEYS[0].upper()}"):
            assert (await client.get("/version", headers={"Authorization": value})).status_code == 401
        twice = [("Authorization", f"Bearer {KEYS[0]}"), ("Authorization", f"Bearer {KEYS[0]}")]
        assert (await client.get("/version", headers=twice)).status_code == 401
        assert (await client.get("/version", headers={"Authorization": f"Bearer {KEYS[1]}"})).status_code == 200


async def test_keys_may_be_given_as_hashes() -> None:
    digest = hashlib.sha256(KEYS[0].encode()).hexdigest()
    async with open_client(make(api_key=[f"sha256:{digest}", KEYS[1]])) as client:
        for key, status in ((KEYS[0], 200), (KEYS[1], 200), (digest, 401), (f"sha256:{digest}", 401), ("x" * 12, 401)):
            given = await client.get("/version", headers={"Authorization": f"Bearer {key}"})
            assert given.status_code == status


async def test_keys_from_a_file_guard_the_server(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{KEYS[0]}\n{KEYS[1]}\n")
    async with open_client(make(api_key=[f"file:{file}"])) as client:
        assert (await client.get("/version")).status_code == 401
        for key in KEYS:
            assert (await client.get("/version", headers={"Authorization": f"Bearer {key}"})).status_code == 200


async def test_open_by_flag() -> None:
    async with open_client(make(api_key=KEYS, public_paths=["/metrics", "/"])) as client:
        assert (await client.get("/metrics")).status_code == 200
        assert (await client.get("/")).status_code == 200
        assert (await client.get("/v1/models")).status_code == 401


async def test_root_path_opens_nothing_else() -> None:
    async with open_client(make(api_key=KEYS, root_path="/llm")) as client:
        assert (await client.get("/llm/health")).status_code == 200
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/llm/v1/models")).status_code == 401
        key = {"Authorization": f"Bearer {KEYS[0]}"}
        assert (await client.get("/llm/v1/models", headers=key)).status_code == 200
        assert (await client.get("/v1/models", headers=key)).status_code == 200


async def test_header_limit() -> None:
    async with open_client(make()) as client:
        check_envelope(await client.get("/version", headers={"X-Big": "x" * 70_000}), 431)
        assert (await client.get("/version", headers={"X-Big": "x" * 60_000})).status_code == 200


async def test_request_ids(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "server.access")
    async with open_client(make(api_key=KEYS)) as client:
        for path in ("/version", "/nowhere", "/health"):
            assert (await client.get(path, headers={"X-Request-Id": "a.B-9_z"})).headers["x-request-id"] == "a.B-9_z"
        for bad in ("", "a b", "x" * 129, "a\tb", "é", "a;b"):
            given = (await client.get("/version", headers={"X-Request-Id": bad.encode()})).headers["x-request-id"]
            assert re.fullmatch(r"[0-9a-f]{32}", given)
    assert {record.status for record in caplog.records if record.name == "server.access"} == {401}


async def test_prompts_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with open_client(make()) as client:
        secret = "the-secret-of-the-prompt"
        assert (await client.post("/v1/completions", json={"prompt": secret})).status_code == 200
        assert (await client.post("/v1/completions", json={"prompt": secret, "n": secret})).status_code == 400
        body = {"messages": [{"role": "user", "content": secret}], "guidance": "bon", "stream": True}
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    assert caplog.records
    assert not any(secret in str(vars(record)) for record in caplog.records)


async def test_cors() -> None:
    origin = {"Origin": "https://app.example"}
    asked = "authorization, content-type, traceparent, x-request-id"
    preflight = {**origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": asked}
    async with open_client(make(api_key=KEYS, cors_origins=["https://app.example"])) as client:
        response = await client.options("/v1/completions", headers=preflight)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "https://app.example"
        assert "authorization" in response.headers["access-control-allow-headers"].lower()
        for wrong in ({"Access-Control-Request-Method": "DELETE"}, {"Access-Control-Request-Headers": "x-evil"}):
            check_envelope(await client.options("/v1/completions", headers={**preflight, **wrong}), 400)
        elsewhere = await client.options("/v1/completions", headers={**preflight, "Origin": "https://evil.example"})
        assert elsewhere.status_code == 400
        assert "access-control-allow-origin" not in elsewhere.headers
        refused = await client.get("/v1/models", headers=origin)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://app.example"
        assert "access-control-allow-credentials" not in refused.headers
        key = {**origin, "Authorization": f"Bearer {KEYS[0]}"}
        answer = await client.post("/v1/completions", json={"prompt": "Hi"}, headers=key)
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        assert {"X-Request-Id", "Retry-After"} <= set(answer.headers["access-control-expose-headers"].split(", "))
        other = await client.get("/health", headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
    async with open_client(make()) as client:
        assert "access-control-allow-origin" not in (await client.get("/health", headers=origin)).headers

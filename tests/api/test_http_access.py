"""Who may come in, and what a request is called: keys, prefixes, origins, header limits, ids."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Message

from server.api import middleware
from tests.api.scripted_engine import (
    KEYS,
    ScriptedEngine,
    at_once,
    bearer,
    check_envelope,
    make,
    open_client,
    operations,
    routes,
    serving,
)

PROBES = ("/health", "/ready", "/ping")
DIGEST = hashlib.sha256(KEYS[0].encode()).hexdigest()


async def test_every_route_is_guarded() -> None:
    app = make(api_key=KEYS)
    found = {(method, path.replace("{model_id:path}", "dlm")) for method, path in routes(app)}
    assert found == set(operations(app)) | {("GET", "/openapi.json"), ("GET", "/playground/{name}")}
    async with open_client(app) as client:
        for method, path in found:
            for headers in ({}, bearer("wrong-key-0000"), {"Authorization": f"Basic {KEYS[0]}"}):
                response = await client.request(method, path, headers=headers)
                if path in PROBES:
                    assert response.status_code == (await client.head(path, headers=headers)).status_code == 200
                else:
                    error = check_envelope(response, 401)
                    assert error["code"] == "invalid_api_key"
                    assert response.headers["www-authenticate"].startswith("Bearer")
            for key in KEYS:
                response = await client.request(method, path, headers={"Authorization": f"bearer {key}"})
                assert response.status_code not in (401, 403)
        for path in {path for _, path in found} - {*PROBES}:
            for method in ("HEAD", "OPTIONS", "PUT", "PATCH", "DELETE", "TRACE", "BREW"):
                response = await client.request(method, path)
                assert response.status_code == 401, (method, path)
                assert "x-request-id" in response.headers
        for path in ("/nowhere", "/health/", "//health", "/HEALTH", "/v1/%2e%2e/health"):
            assert (await client.get(path)).status_code == 401


async def test_a_route_that_is_added_later_needs_a_key_too() -> None:
    app = make(api_key=KEYS)

    async def secret() -> dict[str, str]:
        return {"secret": "told"}

    app.add_api_route("/internal/new", secret)
    app.mount("/files", make())
    async with open_client(app) as client:
        for path in ("/internal/new", "/files/v1/models", "/files/health", "/docs", "/redoc", "/openapi.json"):
            check_envelope(await client.get(path), 401)
        answer = await client.get("/internal/new", headers=bearer(KEYS[0]))
        assert answer.json() == {"secret": "told"}


async def test_nothing_is_read_from_a_client_without_a_key() -> None:
    async def body() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    async with open_client(make(api_key=KEYS)) as client:
        large = {"Content-Type": "application/json", "Content-Length": "99999999999"}
        check_envelope(await client.post("/v1/completions", content=body(), headers=large), 401)


async def test_a_websocket_is_closed() -> None:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope: dict[str, Any] = {"type": "websocket", "path": "/v1/models", "headers": [], "root_path": ""}
    await make(api_key=KEYS)({**scope, "query_string": b"", "subprotocols": []}, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


@pytest.mark.parametrize("given", ["plain", "hashed", "file"])
async def test_keys_are_compared_exactly_however_they_are_given(given: str, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("\n".join(KEYS))
    keys = {"plain": KEYS, "hashed": [f"sha256:{DIGEST}", KEYS[1]], "file": [f"file:{file}"]}[given]
    near = (f"{KEYS[0]}x", KEYS[0].upper(), DIGEST, f"sha256:{DIGEST}")
    async with open_client(make(api_key=keys)) as client:
        for value in ("", "Bearer", "Bearer ", KEYS[0], *(f"Bearer {key}" for key in near)):
            assert (await client.get("/version", headers={"Authorization": value})).status_code == 401
        twice = [*bearer(KEYS[0]).items()] * 2
        assert (await client.get("/version", headers=twice)).status_code == 401
        for key in KEYS:
            assert (await client.get("/version", headers=bearer(key))).status_code == 200


@pytest.mark.parametrize("key", [*KEYS, "wrong-key-0000", "", KEYS[0][:-1], KEYS[0] + "\x00"])
async def test_every_key_is_compared_whichever_fits(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time taken must not tell which key was near, so no comparison is skipped and none ends early."""
    compared: list[tuple[int, int]] = []

    def counting(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return hmac.compare_digest(one, other)

    monkeypatch.setattr(middleware, "hmac", type("Counting", (), {"compare_digest": staticmethod(counting)}))
    async with open_client(make(api_key=KEYS)) as client:
        response = await client.get("/version", headers={"Authorization": b"Bearer " + key.encode()})
    assert (response.status_code == 200) == (key in KEYS)
    assert compared == [(32, 32)] * len(KEYS)


async def test_open_by_flag() -> None:
    async with open_client(make(api_key=KEYS, public_paths=["/metrics", "/"])) as client:
        assert (await client.get("/metrics")).status_code == 200
        assert (await client.get("/")).status_code == 200
        assert (await client.get("/v1/models")).status_code == 401


async def test_root_path_opens_nothing_else() -> None:
    async with open_client(make(api_key=KEYS, root_path="/llm/v2")) as client:
        for prefix in ("/llm/v2", ""):  # a proxy may or may not have cut it off
            assert (await client.get(f"{prefix}/health")).status_code == 200
            assert (await client.get(f"{prefix}/v1/models")).status_code == 401
            assert (await client.get(f"{prefix}/v1/models/dlm", headers=bearer(KEYS[0]))).json()["id"] == "dlm"
            document = (await client.get(f"{prefix}/openapi.json", headers=bearer(KEYS[0]))).json()
            assert document["servers"] == [{"url": "/llm/v2"}]
        assert (await client.get("/llm/v1/models", headers=bearer(KEYS[0]))).status_code == 404


async def test_head_is_get_without_its_body_also_while_the_server_is_not_ready() -> None:
    """A body after a header would be read as the next answer, so one real connection is used for all."""
    engine = ScriptedEngine(at_once, is_ready=False)
    one: dict[str, Any] = {"limits": httpx.Limits(max_connections=1), "timeout": 60}
    async with serving(engine) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", **one) as client:
        readable = {path for method, path in operations(make()) if method == "GET"} | {"/openapi.json"}
        assert {*PROBES, "/metrics", "/", "/version", "/v1/models", "/v1/models/dlm"} <= readable
        for ready in (False, True):
            engine.is_ready = ready
            for path in sorted(readable):
                head = await client.head(path)
                get = await client.get(path)
                assert head.status_code == get.status_code == (200 if ready or path != "/ready" else 503), path
                assert head.content == b""
                assert get.content
                assert head.headers["content-type"] == get.headers["content-type"]
                if path != "/metrics":  # which has grown meanwhile
                    assert int(head.headers["content-length"]) == len(get.content)


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
        answer = await client.post("/v1/completions", json={"prompt": "Hi"}, headers=origin | bearer(KEYS[0]))
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        assert {"X-Request-Id", "Retry-After"} <= set(answer.headers["access-control-expose-headers"].split(", "))
        other = await client.get("/health", headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
    async with open_client(make()) as client:
        assert "access-control-allow-origin" not in (await client.get("/health", headers=origin)).headers

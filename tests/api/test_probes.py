"""Load balancers probe with HEAD: on a real socket it is answered as GET is, without a body."""

from __future__ import annotations

import httpx
import pytest

from server.settings import load
from tests.api.scripted_engine import KEYS, ScriptedEngine, at_once, make, open_client, operations, serving, unloaded

# A body behind a header would be read as the next answer, so each connection is used twice.
PROBES = ("/health", "/ready", "/ping", "/metrics")


async def test_head_is_get_without_its_body() -> None:
    async with (
        serving(load({"port": 0})) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", limits=httpx.Limits(max_connections=1)) as client,
    ):
        readable = {path for method, path in operations(make()) if method == "GET"} | {"/openapi.json"}
        assert {*PROBES, "/", "/version", "/v1/models", "/v1/models/dlm"} <= readable
        for path in readable:
            head = await client.head(path)
            get = await client.get(path)
            assert head.status_code == get.status_code == 200, path
            assert head.content == b""
            assert get.content
            assert head.headers["content-type"] == get.headers["content-type"]
            if path != "/metrics":  # which has grown meanwhile
                assert int(head.headers["content-length"]) == len(get.content)


async def test_head_tells_that_a_server_is_not_ready() -> None:
    engine = ScriptedEngine(at_once, is_ready=False)
    async with (
        serving(load({"port": 0}), engine) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", limits=httpx.Limits(max_connections=1)) as client,
    ):
        for path, status in (("/health", 200), ("/ready", 503), ("/metrics", 200), ("/ready", 503)):
            head = await client.head(path)
            assert (head.status_code, head.content) == (status, b""), path
        assert (await client.get("/ready")).json()["error"]["code"] == "not_ready"
        engine.is_ready = True
        assert (await client.head("/ready")).status_code == 200


async def test_head_of_a_server_that_could_not_start() -> None:
    app = make(unloaded())
    app.state.frontend.failure = RuntimeError("no models")
    async with open_client(app) as client:
        for method in ("GET", "HEAD"):
            response = await client.request(method, "/health")
            assert response.status_code == 503


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_head_needs_a_key_where_get_does(method: str) -> None:
    async with open_client(make(api_key=KEYS)) as client:
        for path, status in (("/health", 200), ("/ready", 200), ("/metrics", 401), ("/v1/models", 401)):
            assert (await client.request(method, path)).status_code == status
        known = {"Authorization": f"Bearer {KEYS[0]}"}
        assert (await client.request(method, "/metrics", headers=known)).status_code == 200


async def test_head_is_for_what_can_be_read() -> None:
    app = make()
    async with open_client(app) as client:
        assert (await client.head("/v1/completions")).status_code == 405
    assert all("head" not in methods for methods in app.openapi()["paths"].values())

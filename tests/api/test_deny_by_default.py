"""With keys in force nothing is served without one, whatever is added to the application and before a body is read."""

from __future__ import annotations

import hmac
from typing import Any

import pytest
from starlette.types import Message

from server.api import middleware
from tests.api.scripted_engine import KEYS, check_envelope, make, open_client, scope_of


async def test_a_route_that_is_added_later_needs_a_key_too() -> None:
    app = make(api_key=KEYS)

    async def secret() -> dict[str, str]:
        return {"secret": "told"}

    app.add_api_route("/internal/new", secret)
    app.mount("/files", make())
    async with open_client(app) as client:
        for path in ("/internal/new", "/files/v1/models", "/files/health", "/docs", "/redoc", "/openapi.json"):
            response = await client.get(path)
            check_envelope(response, 401)
            assert "told" not in response.text
        answer = await client.get("/internal/new", headers={"Authorization": f"Bearer {KEYS[0]}"})
        assert answer.json() == {"secret": "told"}


async def test_nothing_is_read_from_a_client_without_a_key() -> None:
    statuses: list[int] = []

    async def receive() -> Message:
        raise AssertionError("the body was read")

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    scope = scope_of()
    scope["headers"].append((b"content-length", b"99999999999"))
    await make(api_key=KEYS)(scope, receive, send)
    assert statuses == [401]


async def test_a_websocket_is_closed() -> None:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope: dict[str, Any] = {**scope_of("/v1/models"), "type": "websocket", "subprotocols": []}
    await make(api_key=KEYS)(scope, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


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

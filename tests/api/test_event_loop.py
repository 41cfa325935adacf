"""Large requests leave the event loop free: other clients are answered while their texts are read."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.api.scripted_engine import make, open_client

SIZE = 1_500_000
LARGE: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "word " * (SIZE // 5)}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "<" * SIZE}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "<|im_end|>" * (SIZE // 10)}]}),
    ("/tokenize", {"prompt": "word " * (SIZE // 5), "return_token_strs": True}),
    ("/v1/completions", {"prompt": [7] * (SIZE // 3)}),
]


@pytest.mark.parametrize(("path", "body"), LARGE, ids=range(len(LARGE)))
async def test_large_texts_leave_the_event_loop_free(path: str, body: dict[str, Any]) -> None:
    """While one request is read, the loop turns many times. Read on the loop itself, it would turn a dozen times."""
    turns = 0
    over = asyncio.Event()

    async def turn() -> None:
        nonlocal turns
        while not over.is_set():
            turns += 1
            await asyncio.sleep(0.001)

    data = json.dumps(body).encode()
    async with open_client(make()) as client:
        await client.post("/tokenize", json={"prompt": "the tokenizer is loaded"})
        turning = asyncio.create_task(turn())
        await asyncio.sleep(0)
        before = turns
        response = await client.post(path, content=data, headers={"Content-Type": "application/json"})
        taken = turns - before
        over.set()
        await turning
    assert response.status_code in (200, 400)
    assert taken > 20

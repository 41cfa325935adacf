"""Large requests leave the event loop free: other clients are answered while their texts are read."""

from __future__ import annotations

import json
import time
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
    """The loop's thread does little of the work: a hundredth or two, and nearly all of it if the text were read on the
    loop. Shares of processor time do not depend on how fast or how busy the machine is."""
    data = json.dumps(body).encode()
    async with open_client(make()) as client:
        await client.post("/tokenize", json={"prompt": "the tokenizer is loaded"})
        on_the_loop, altogether = time.thread_time(), time.process_time()
        response = await client.post(path, content=data, headers={"Content-Type": "application/json"})
        on_the_loop, altogether = time.thread_time() - on_the_loop, time.process_time() - altogether
    assert response.status_code in (200, 400)
    assert on_the_loop < 0.25 * altogether

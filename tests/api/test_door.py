"""What a request costs before it is queued: what no step of this server could hold is refused by the field that asks
for it, and large texts leave the event loop free."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import httpx
import pytest

from server.budget import Budget
from tests.api.scripted_engine import INFO, ScriptedEngine, at_once, check_envelope, make, open_client

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LARGEST = Budget(tokens=60, guided_rows=20, logit_rows=30, reward_tokens=18)
SIZE = 1_500_000


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


async def post(path: str, body: dict[str, Any], largest: Budget = LARGEST) -> httpx.Response:
    """What a server answers whose largest step is this."""
    engine = ScriptedEngine(at_once, info=replace(INFO, largest=largest))
    async with open_client(make(engine)) as client:
        return await client.post(path, json=body)


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (COMPLETIONS, {"prompt": "Hi", "max_tokens": 31}, "31 rows of logits, more than the 30 "),
        (COMPLETIONS, {"prompt": [43] * 40, "max_tokens": 21}, "61 canvas tokens, more than the 60 "),
        (COMPLETIONS, {"prompt": [43] * 20, "max_tokens": 11, "diffusion": {"cfg_scale": 0.5}}, "62 canvas tokens"),
        (COMPLETIONS, {"prompt": "Hi", "max_tokens": 19, "guidance": "entrgi"}, "19 reward-model tokens, more than"),
        (CHAT, {"messages": user("Hi"), "max_tokens": 21, "guidance": "aps"}, "21 guided rows of logits, more than"),
    ],
)
async def test_the_budget_that_is_exceeded_is_named(path: str, body: dict[str, Any], message: str) -> None:
    error = check_envelope(await post(path, body), 400)
    assert error["param"] == "max_tokens"
    assert message in error["message"]
    assert (await post(path, body, Budget())).status_code == 200  # nothing else is wrong with it


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [43] * 30, "max_tokens": 30, "n": 5},  # whatever the number of its answers
        {"prompt": "Hi", "max_tokens": 18, "guidance": "entrgi", "best_of": 8},
        {"prompt": "Hi", "max_tokens": 25, "guidance": "bon"},  # steered by nothing: no guided rows
    ],
)
async def test_what_just_fits_is_taken(body: dict[str, Any]) -> None:
    assert (await post(COMPLETIONS, body)).status_code == 200


LARGE: list[tuple[str, dict[str, Any]]] = [
    (COMPLETIONS, {"prompt": "word " * (SIZE // 5)}),
    (CHAT, {"messages": user("<" * SIZE)}),
    (CHAT, {"messages": user("<|im_end|>" * (SIZE // 10))}),
    ("/tokenize", {"prompt": "word " * (SIZE // 5), "return_token_strs": True}),
    (COMPLETIONS, {"prompt": [7] * (SIZE // 3)}),
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

"""OpenAI's own client, unchanged, over a real socket: sync, async, streams, errors, and our fields in `extra_body`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import openai
import pytest

if TYPE_CHECKING:
    from tests.support.serving import Served

MESSAGES = [{"role": "user", "content": "Write a line."}]


@pytest.fixture
def client(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="not-needed", max_retries=0)


def test_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="dlm", prompt="Hello", max_tokens=8, seed=3, n=2, best_of=3, extra_body={"guidance": "bon"}
    )
    assert answer._request_id
    rewards = [choice.model_extra["reward"] for choice in answer.choices if choice.model_extra]
    assert len(rewards) == 2
    assert rewards == sorted(rewards, reverse=True)
    assert answer.model_extra is not None
    assert answer.model_extra["guidance"]["seed"] == 3
    assert client.models.retrieve("rm").owned_by == "entrgi"


def test_chat_and_its_stream_agree(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="dlm", messages=MESSAGES, max_completion_tokens=16, seed=3)
    stream = client.chat.completions.create(
        model="dlm",
        messages=MESSAGES,
        max_completion_tokens=16,
        seed=3,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"stream_canvas": True},
    )
    text, finish, usage, canvases = "", None, None, 0
    for chunk in stream:
        usage = chunk.usage or usage
        canvases += "canvas" in (chunk.model_extra or {})
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
    assert text == whole.choices[0].message.content
    assert finish == whole.choices[0].finish_reason
    assert usage == whole.usage
    assert canvases > 1


async def test_async_stream(server: Served) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="not-needed", max_retries=0) as client:
        whole = await client.completions.create(model="dlm", prompt="Hello", max_tokens=16, seed=4)
        stream = await client.completions.create(model="dlm", prompt="Hello", max_tokens=16, seed=4, stream=True)
        text = "".join([choice.text async for chunk in stream for choice in chunk.choices])
    assert text == whole.choices[0].text


def test_errors_become_its_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4o", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    assert missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model="dlm", prompt="Hi", logprobs=2)
    assert wrong.value.param == "logprobs"
    assert wrong.value.request_id
    with pytest.raises(openai.BadRequestError) as ours:
        client.completions.create(model="dlm", prompt="Hi", extra_body={"guidance": {"method": "bon", "eta": 1}})
    assert ours.value.param == "guidance.eta"

"""Files and batches as OpenAI's own client asks for them, of a server that keeps them in a folder."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
from openai.types import Batch

from server.front.engine import Engine
from tests.api.scripted_engine import KEYS, serving

CHAT = "/v1/chat/completions"
ENDED = ("completed", "failed", "expired", "cancelled")
Lines = list[dict[str, Any]]


def line(name: str, url: str = "/v1/completions", **body: Any) -> str:
    return json.dumps({"custom_id": name, "method": "POST", "url": url, "body": {"prompt": "Hi"} | body})


def sent(lines: list[str]) -> tuple[str, bytes]:
    return "requests.jsonl", "\n".join(lines).encode()


@asynccontextmanager
async def batching(folder: Path, engine: Engine | None = None, **settings: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    """A client of a server that keeps its batches in this folder."""
    async with (
        serving(engine, batch_dir=str(folder), api_key=KEYS, **settings) as port,
        openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEYS[0], max_retries=0) as client,
    ):
        yield client


async def begun(client: openai.AsyncOpenAI, lines: list[str], endpoint: Any = "/v1/completions") -> Batch:
    file = await client.files.create(file=sent(lines), purpose="batch")
    return await client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h")


async def until(client: openai.AsyncOpenAI, batch: Batch, reached: Callable[[Batch], bool]) -> Batch:
    async with asyncio.timeout(60):
        while not reached(batch):
            await asyncio.sleep(0.01)
            batch = await client.batches.retrieve(batch.id)
    return batch


async def ended(client: openai.AsyncOpenAI, batch: Batch) -> Batch:
    return await until(client, batch, lambda each: each.status in ENDED)


async def results(client: openai.AsyncOpenAI, identity: str | None) -> Lines:
    """The lines of a file; none where there is no file."""
    return parsed((await client.files.content(identity)).text) if identity else []


def parsed(text: str) -> Lines:
    return [json.loads(each) for each in text.splitlines()]


async def why_failed(client: openai.AsyncOpenAI, batch: Batch) -> tuple[str | None, str | None]:
    """The code and the field of the problem with a batch."""
    batch = await ended(client, batch)
    assert batch.status == "failed"
    assert batch.errors is not None
    assert batch.errors.data is not None
    (problem,) = batch.errors.data
    return problem.code, problem.param


def counts(batch: Batch) -> tuple[int, int, int]:
    assert batch.request_counts is not None
    return batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed

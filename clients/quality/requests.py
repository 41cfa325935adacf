"""Asking the server: one request for each prompt, a few at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from clients.errors import ClientError
from clients.quality.prompts import Prompt

TIMEOUT_SECONDS = 900.0


@dataclass(frozen=True)
class Answer:
    """What came back for one prompt: the texts in the server's order, the final reward of every trajectory, and what it
    took (of the longest trajectory)."""

    prompt: Prompt
    texts: tuple[str, ...]
    finish_reasons: tuple[str, ...]
    choice_rewards: tuple[float | None, ...]
    trajectory_rewards: tuple[float, ...]
    steps: int = 0
    model_calls: int = 0
    reward_calls: int = 0
    approximations: tuple[str, ...] = ()


class ServerError(ClientError):
    """The server refused a request; the message is its own."""


def body_for(prompt: Prompt, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(path, JSON body) of a prompt in its form."""
    if prompt.form == "chat":
        return "/v1/chat/completions", {"messages": [{"role": "user", "content": prompt.text}], **options}
    return "/v1/completions", {"prompt": prompt.text, **options}


def parse(prompt: Prompt, payload: dict[str, Any]) -> Answer:
    """Read a completion response (docs: the `guidance` object holds all trajectories' rewards)."""
    choices = payload["choices"]
    texts = tuple(c["message"]["content"] if prompt.form == "chat" else c["text"] for c in choices)
    report = payload.get("guidance") or {}
    rewards = report.get("rewards") or [[]]
    return Answer(
        prompt,
        texts,
        tuple(choice["finish_reason"] for choice in choices),
        tuple(choice.get("reward") for choice in choices),
        tuple(float(reward) for reward in rewards[0] if reward is not None),
        **{name: int(report.get(name, 0)) for name in ("steps", "model_calls", "reward_calls")},
        approximations=tuple(report.get("approximations", ())),
    )


async def models(client: httpx.AsyncClient) -> list[dict[str, Any]]:
    """The entries of /v1/models."""
    response = await client.get("/v1/models")
    response.raise_for_status()
    entries: list[dict[str, Any]] = response.json()["data"]
    return entries


async def ask(
    client: httpx.AsyncClient, prompts: Sequence[Prompt], options: dict[str, Any], *, seed: int, concurrency: int
) -> list[Answer]:
    """Answers in the prompts' order. Prompt i is sent with seed `seed` + i, whatever the options.

    Raises ServerError with the server's message when a request is refused.
    """
    gate = asyncio.Semaphore(concurrency)

    async def one(index: int, prompt: Prompt) -> Answer:
        path, body = body_for(prompt, {**options, "seed": seed + index})
        async with gate:
            response = await client.post(path, json=body)
        if response.status_code != 200:
            raise ServerError(f"{response.status_code}: {response.text[:400]}")
        return parse(prompt, response.json())

    return list(await asyncio.gather(*(one(index, prompt) for index, prompt in enumerate(prompts))))

"""What HTTP and scheduling add to a denoising step: the same requests over HTTP and to the engine without it, in turn.

Both halves compute the same tokens with the same number of threads; which goes first alternates. Over HTTP the clock
runs from the first request's departure to the last answer's arrival, the client's own work included. Requests do not
arrive all at once, so the engine over HTTP may take a step or two more, with fewer rows in them. So whole sets are
compared, where such steps count as overhead, and not the times of steps, which they would make shorter.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from tqdm import tqdm

from benchmarks.processes import Engine, metrics
from benchmarks.report import CaseResult, Figure, Row
from clients.aio import AsyncClient
from clients.errors import ClientError
from clients.options import Diffusion, Options
from clients.types import Completion

STEPS_METRIC = "entrgi:batch_trajectories_count"
REQUESTS = 16
LIMIT = 0.05


@dataclass(frozen=True, slots=True)
class Half:
    """One request set, one way. `outside` is, over HTTP, the mean time of a request that was not between its first and
    last step in the engine, in seconds."""

    seconds: float
    engine_steps: int
    token_ids: list[list[int]]
    outside: float = 0.0

    @property
    def step_seconds(self) -> float:
        """Seconds a step of the engine."""
        return self.seconds / self.engine_steps


async def overhead(
    client: AsyncClient, url: str, alone: Engine, *, max_tokens: int, steps: int, rounds: int
) -> CaseResult:
    """Measure `rounds` rounds. ClientError when the tokens differ."""
    work = {"method": "none", "prompts": REQUESTS, "best_of": 1, "max_tokens": max_tokens, "steps": steps}
    http: list[Half] = []
    process: list[Half] = []
    for number in tqdm(range(-1, rounds), desc="overhead", leave=False):
        asked = work | {"set": 100 + number}
        requests = (await alone.ask(asked | {"run": False}))["requests"]
        halves = []
        for way in ("http", "process") if number % 2 else ("process", "http"):
            if way == "http":
                halves.append((http, await over_http(client, url, requests, max_tokens, steps)))
            else:
                done = await alone.ask(asked)
                tokens = [trajectories[0] for trajectories in done["token_ids"]]
                halves.append((process, Half(done["seconds"], done["engine_steps"], tokens)))
        if halves[0][1].token_ids != halves[1][1].token_ids:
            raise ClientError(f"request set {number}: the server's tokens are not those of the engine without HTTP")
        if number >= 0:  # the first round is a warm-up
            for kept, half in halves:
                kept.append(half)
    return CaseResult("overhead", rows(http, process), figures(http, process))


async def over_http(
    client: AsyncClient, url: str, requests: Sequence[dict[str, Any]], max_tokens: int, steps: int
) -> Half:
    """Send the requests all at once and wait for the last answer."""

    async def one(request: dict[str, Any]) -> tuple[Completion, float]:
        asked: Options = {
            "seed": request["seed"],
            "temperature": request["temperature"],
            "top_p": request["top_p"],
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "return_token_ids": True,
            "guidance": "none",
            "diffusion": Diffusion(steps=steps),
        }
        started = time.perf_counter()
        completion = await client.complete(request["prompt"], chat_template=True, **asked)
        return completion, time.perf_counter() - started

    before = (await metrics(url))[STEPS_METRIC]
    started = time.perf_counter()
    answers = await asyncio.gather(*(one(request) for request in requests))
    seconds = time.perf_counter() - started
    engine_steps = round((await metrics(url))[STEPS_METRIC] - before)
    tokens, outside = [], []
    for completion, latency in answers:
        token_ids, report = completion.choices[0].token_ids, completion.guidance
        if token_ids is None or report is None:
            raise ClientError("the server left out token_ids or guidance, which were asked for")
        tokens.append(list(token_ids))
        outside.append(latency - report.generation_ms / 1000)
    return Half(seconds, engine_steps, tokens, sum(outside) / len(outside))


def rows(http: Sequence[Half], process: Sequence[Half]) -> list[Row]:
    """The rows of the table, one for each way."""
    return [
        {
            "variant": variant,
            "rounds": len(halves),
            "seconds": median(half.seconds for half in halves),
            "least_seconds": min(half.seconds for half in halves),
            "engine_steps": median(half.engine_steps for half in halves),
            "step_ms": 1000 * median(half.step_seconds for half in halves),
            "outside_steps_ms": 1000 * median(half.outside for half in halves),
        }
        for variant, halves in (("over HTTP", http), ("in process", process))
    ]


def figures(http: Sequence[Half], process: Sequence[Half]) -> list[Figure]:
    """What HTTP and scheduling add, as a share of the engine's own time: the median over the rounds, and of the least
    times."""
    share = median(a.seconds / b.seconds - 1 for a, b in zip(http, process, strict=True))
    least = min(a.seconds for a in http) / min(b.seconds for b in process) - 1
    return [
        Figure("overhead: share of the engine's time", share, at_most=LIMIT),
        Figure("overhead: the same of the least times", least),
    ]

"""Load over HTTP, in one of two ways.

Open loop (`--rate`): requests leave at Poisson times whether or not earlier ones have come back. Latencies are counted
from the time at which a request *should* have left, so a stall counts for every request that it delayed.
Closed loop (`--concurrency`): that many clients, each of which sends its next request when it has the last answer. It
slows down with the server, so it shows the server's throughput and hides its queue.

Printed: a table of percentiles, then one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import httpx
from rich.table import Table

from .aio import AsyncClient, AsyncEventStream
from .arguments import add_option, prompts_of
from .calls import DEFAULT_TIMEOUT
from .errors import ApiError, ClientError
from .events import ChoiceFinished, Summary, TextDelta
from .options import Diffusion, Options, Query, guidance_of
from .retry import RetryPolicy
from .terminal import console
from .types import ChatCompletion, Completion

PROMPTS = (
    "Write a short review of a hotel.",
    "What did you think of the phone?",
    "Tell me about the book you read.",
    "Describe the restaurant that you tried.",
)
PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request. Times in seconds from its scheduled departure; `step_seconds` is per denoising step."""

    status: str
    lateness_seconds: float
    latency_seconds: float
    first_text_seconds: float | None = None
    queue_seconds: float | None = None
    step_seconds: float | None = None
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """A run. `latencies` maps a quantity's name to its percentiles in seconds, over the successful requests. A closed
    loop offers as much as is completed: its `offered_per_second` is None."""

    requests: int
    offered_per_second: float | None
    completed_per_second: float
    tokens_per_second: float
    seconds: float
    outcomes: dict[str, int]
    latencies: dict[str, dict[str, float]]


def arrivals(rate: float, count: int, seed: int) -> list[float]:
    """`count` departure times in seconds of a Poisson process of `rate` per second, from its start."""
    generator = random.Random(seed)
    times, now = [], 0.0
    for _ in range(count):
        now += generator.expovariate(rate)
        times.append(now)
    return times


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0..100) of non-empty `values`: the smallest value with at least q% at or below it."""
    ranked = sorted(values)
    return ranked[max(math.ceil(q / 100.0 * len(ranked)) - 1, 0)]


async def generate_load(
    client: AsyncClient, prompts: Sequence[Query], options: Options, times: Sequence[float], *, stream: bool, seed: int
) -> Report:
    """Send one request at each of `times`; request i has seed `seed` + i and prompt i modulo their number."""
    start = time.perf_counter()

    async def one(index: int, due: float) -> Outcome:
        await asyncio.sleep(max(start + due - time.perf_counter(), 0.0))
        own: Options = {**options, "seed": seed + index}
        prompt = prompts[index % len(prompts)]
        return await _request(client, prompt, own, start + due, stream=stream)

    outcomes = await asyncio.gather(*(one(index, due) for index, due in enumerate(times)))
    return summarise(outcomes, offered=len(times) / times[-1], seconds=time.perf_counter() - start)


async def closed_loop(
    client: AsyncClient,
    prompts: Sequence[Query],
    options: Options,
    *,
    requests: int,
    concurrency: int,
    stream: bool,
    seed: int,
) -> Report:
    """Send `requests` in all from `concurrency` clients; request i is that of `generate_load`."""
    start = time.perf_counter()
    numbers = iter(range(requests))
    outcomes: list[Outcome] = []

    async def one_client() -> None:
        for index in numbers:  # shared: each takes the next that nobody has taken
            own: Options = {**options, "seed": seed + index}
            prompt = prompts[index % len(prompts)]
            outcomes.append(await _request(client, prompt, own, time.perf_counter(), stream=stream))

    await asyncio.gather(*(one_client() for _ in range(concurrency)))
    return summarise(outcomes, offered=None, seconds=time.perf_counter() - start)


async def _request(client: AsyncClient, prompt: Query, options: Options, due: float, *, stream: bool) -> Outcome:
    lateness = time.perf_counter() - due
    first_text: float | None = None
    try:
        if stream:
            summary = Summary()
            async with await _stream(client, prompt, options) as events:
                async for event in events:
                    if first_text is None and isinstance(event, TextDelta | ChoiceFinished):
                        first_text = time.perf_counter() - due
                    if isinstance(event, Summary):
                        summary = event
            usage, report = summary.usage, summary.guidance
        else:
            completion = await _complete(client, prompt, options)
            usage, report = completion.usage, completion.guidance
    except ApiError as error:
        return Outcome(str(error.status or "error in stream"), lateness, time.perf_counter() - due)
    except ClientError as error:
        return Outcome(type(error).__name__, lateness, time.perf_counter() - due)
    return Outcome(
        "ok",
        lateness,
        time.perf_counter() - due,
        first_text,
        queue_seconds=report.queue_ms / 1000 if report else None,
        step_seconds=report.generation_ms / 1000 / report.model_calls if report and report.model_calls else None,
        tokens=usage.completion_tokens if usage else 0,
    )


async def _stream(client: AsyncClient, prompt: Query, options: Options) -> AsyncEventStream:
    if isinstance(prompt, str):
        return await client.stream_complete(prompt, **options)
    return await client.stream_chat(prompt, **options)


async def _complete(client: AsyncClient, prompt: Query, options: Options) -> Completion | ChatCompletion:
    if isinstance(prompt, str):
        return await client.complete(prompt, **options)
    return await client.chat(prompt, **options)


def summarise(outcomes: Sequence[Outcome], *, offered: float | None, seconds: float) -> Report:
    """Percentiles and rates of a run that took `seconds`."""
    good = [outcome for outcome in outcomes if outcome.status == "ok"]
    columns = {
        "latency": [o.latency_seconds for o in good],
        "first text": [o.first_text_seconds for o in good if o.first_text_seconds is not None],
        "queue": [o.queue_seconds for o in good if o.queue_seconds is not None],
        "step": [o.step_seconds for o in good if o.step_seconds is not None],
        "late departure": [o.lateness_seconds for o in outcomes],
    }
    return Report(
        requests=len(outcomes),
        offered_per_second=offered,
        completed_per_second=len(good) / seconds,
        tokens_per_second=sum(o.tokens for o in good) / seconds,
        seconds=seconds,
        outcomes=dict(sorted(Counter(o.status for o in outcomes).items())),
        latencies={
            name: {
                "mean": sum(values) / len(values),
                **{f"p{q}": percentile(values, q) for q in PERCENTILES},
                "max": max(values),
            }
            for name, values in columns.items()
            if values
        },
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    load = parser.add_mutually_exclusive_group(required=True)
    load.add_argument("--rate", type=_positive, help="open loop: mean arrivals in a second")
    load.add_argument("--concurrency", type=int, help="closed loop: requests in flight")
    add_option(parser, "--requests", "how many to send", type=int, default=100)
    add_option(parser, "--seed", "of the arrivals; request i has this seed plus i", type=int, default=0)
    add_option(
        parser,
        "--prompts",
        "text with one prompt on each line, or JSON lines with `prompt` or `messages`; - is standard input",
        "four built in",
        metavar="FILE",
    )
    parser.add_argument("--stream", action="store_true", help="stream, and report the time to the first text")
    text = "a method of the server's, in `models --json`, or smc"
    add_option(parser, "--guidance", text, metavar="METHOD", default="none")
    add_option(parser, "--reward-model", "the reward model that guides", "the first served")
    for name, text in (("best-of", "trajectories"), ("max-tokens", "tokens at most"), ("steps", "denoising steps")):
        add_option(parser, f"--{name}", f"{text} of each request", "the server's", type=int)
    add_option(parser, "--timeout", "deadline of each request in seconds", "the server's", type=float)


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError(text)
    return value


def run(given: argparse.Namespace) -> int:
    """Run the command; 0 if at least one request succeeded."""
    if given.requests < 1:
        raise ClientError("--requests must be at least 1")
    if given.concurrency is not None and given.concurrency < 1:
        raise ClientError("--concurrency must be at least 1")
    prompts: Sequence[Query] = prompts_of(given.prompts) if given.prompts else PROMPTS
    options: Options = {"guidance": guidance_of(given.guidance, reward_model=given.reward_model)}
    if given.best_of is not None:
        options["best_of"] = given.best_of
    if given.max_tokens is not None:
        options["max_tokens"] = given.max_tokens
    if given.timeout is not None:
        options["timeout"] = given.timeout
    if given.steps is not None:
        options["diffusion"] = Diffusion(steps=given.steps)
    report = asyncio.run(_run(given, prompts, options))
    show(report)
    return 0 if report.outcomes.get("ok") else 1


async def _run(given: argparse.Namespace, prompts: Sequence[Query], options: Options) -> Report:
    async with load_client(given.url, given.api_key) as client:
        if given.concurrency is not None:
            return await closed_loop(
                client,
                prompts,
                options,
                requests=given.requests,
                concurrency=given.concurrency,
                stream=given.stream,
                seed=given.seed,
            )
        times = arrivals(given.rate, given.requests, given.seed)
        return await generate_load(client, prompts, options, times, stream=given.stream, seed=given.seed)


def load_client(url: str, api_key: str | None = None) -> AsyncClient:
    """A client that neither retries nor waits for a free connection: either would make an open loop a closed one."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
    return AsyncClient(url, api_key=api_key, retry=RetryPolicy(retries=0), timeout=DEFAULT_TIMEOUT, limits=limits)


def show(report: Report) -> None:
    """The table, then the JSON line."""
    out = console()
    outcomes = ", ".join(f"{status} {count}" for status, count in report.outcomes.items())
    offered = "" if report.offered_per_second is None else f"offered {report.offered_per_second:.2f}/s, "
    out.print(
        f"{report.requests} requests in {report.seconds:.1f} s: {offered}"
        f"completed {report.completed_per_second:.2f}/s, {report.tokens_per_second:.1f} tokens/s; {outcomes}"
    )
    table = Table("seconds", *(f"p{q}" for q in PERCENTILES), "mean", "max")
    for name, row in report.latencies.items():
        cells = [*(row[f"p{q}"] for q in PERCENTILES), row["mean"], row["max"]]
        table.add_row(name, *(f"{cell:.4f}" for cell in cells))
    out.print(table)
    print(json.dumps(asdict(report)))

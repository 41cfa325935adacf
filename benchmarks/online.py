"""The server over HTTP: throughput by concurrency, latencies by arrival rate, and what HTTP and scheduling add.

`python -m benchmarks.online` starts a server on the generated random-weight pair (or takes `--url`), and measures

closed    so many requests in flight all the time (1, 4, 16, 64), guided and not: tokens/s and percentiles;
open      Poisson arrivals at shares of the throughput that `closed` found: percentiles of the time to the first text,
          of the whole answer and of a denoising step, counted from the time at which a request should have left;
streams   one request at a time with the settings of `STREAMS`, texts alone: seconds to the first text and to the last;
overhead  sixteen unguided requests at once, over HTTP and to the same engine in a process without HTTP, in turn, on
          the same requests with the same number of threads. The tokens must be the same; the difference in time is what
          HTTP, the queue between the processes and scheduling cost. Only with a server of its own.

Prints tables and, last, one JSON line; writes the same to `--out`, for `python -m benchmarks.plots`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import tempfile
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from tqdm import tqdm

from benchmarks.checkpoints import write_pair
from benchmarks.overhead import overhead
from benchmarks.processes import engine, served
from benchmarks.report import CaseResult, Row, keep, show
from clients.aio import AsyncClient
from clients.errors import ClientError
from clients.loadgen import PROMPTS, Report, arrivals, closed_loop, generate_load, load_client
from clients.options import Diffusion, Guidance, Options

CASES = ("closed", "open", "streams", "overhead")
METHODS: tuple[str, ...] = ("none", "entrgi")
STREAMS: tuple[tuple[str, int, int | None], ...] = (
    ("none", 1, None),
    ("none", 1, 8),
    ("entrgi", 4, None),
    ("entrgi", 1, None),
    ("entrgi", 1, 16),
    ("entrgi", 1, 8),
    ("entrgi", 1, 4),
)
"""Method, `best_of` and `block_length` of the streams whose first text is timed."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much to do. `rates` are shares of the closed loop's throughput at `reference` in flight."""

    max_tokens: int
    steps: int
    in_flight: tuple[int, ...]
    requests_each: float  # requests a client of the closed loop sends
    arrivals: int
    rates: tuple[float, ...]
    rounds: int
    reference: int = 16


FULL = Size(64, 32, (1, 4, 16, 64), 2.0, 60, (0.25, 0.5, 0.75, 0.9), 5)
QUICK = Size(16, 8, (1, 4, 16), 1.0, 16, (0.5, 0.9), 2)


def options(method: str, size: Size) -> Options:
    """One request: a chat turn, `max_tokens` tokens whatever they are, K = 1 (entrgi: M = 3)."""
    asked: Options = {
        "max_tokens": size.max_tokens,
        "ignore_eos": True,
        "diffusion": Diffusion(steps=size.steps),
        "guidance": Guidance(method, gradient_steps=None if method == "none" else 3),
        "extra": {"chat_template": True},
    }
    return asked


def row(report: Report, **labels: Any) -> Row:
    """One line of a table, in seconds."""
    latencies = report.latencies
    found: Row = labels | {
        "requests": report.requests,
        "ok": report.outcomes.get("ok", 0),
        "requests_per_s": report.completed_per_second,
        "tokens_per_s": report.tokens_per_second,
    }
    for name, key in (("latency", "latency"), ("first_text", "first text"), ("step", "step"), ("queue", "queue")):
        if key in latencies:
            found |= {f"{name}_{q}": latencies[key][q] for q in ("p50", "p95", "p99")}
    return found


async def closed(client: AsyncClient, size: Size) -> list[Row]:
    """The closed loop at every concurrency, with and without guidance."""
    rows = []
    work = [(method, count) for method in METHODS for count in size.in_flight]
    for method, count in tqdm(work, desc="closed loop", leave=False):
        report = await closed_loop(
            client,
            PROMPTS,
            options(method, size),
            requests=max(4, round(size.requests_each * count)),
            concurrency=count,
            stream=True,
            seed=0,
        )
        rows.append(row(report, variant=f"{method}, {count} in flight", method=method, in_flight=count))
    return rows


async def opened(client: AsyncClient, size: Size, capacity: dict[str, float]) -> list[Row]:
    """Poisson arrivals at shares of `capacity`, requests a second by method."""
    rows = []
    work = [(method, share) for method in METHODS for share in size.rates]
    for method, share in tqdm(work, desc="open loop", leave=False):
        rate = share * capacity[method]
        times = arrivals(rate, size.arrivals, seed=round(100 * share))
        report = await generate_load(client, PROMPTS, options(method, size), times, stream=True, seed=0)
        rows.append(row(report, variant=f"{method}, {rate:.2f}/s", method=method, rate=rate, share=share))
    return rows


async def streamed(client: AsyncClient, size: Size) -> list[Row]:
    """One stream at a time with each of the settings, on the same prompts and seeds."""
    rows = []
    for method, best_of, block in tqdm(STREAMS, desc="streams", leave=False):
        block_length = block and min(block, size.max_tokens)
        asked: Options = {
            "max_tokens": size.max_tokens,
            "best_of": best_of,
            "diffusion": Diffusion(block_length=block_length),
            "guidance": Guidance(method),
            "extra": {"chat_template": True},
        }
        count = max(4, size.arrivals // 5)
        report = await closed_loop(client, PROMPTS, asked, requests=count, concurrency=1, stream=True, seed=0)
        blocks = "no blocks" if block_length is None else f"blocks of {block_length}"
        labels = {"method": method, "best_of": best_of, "block_length": block_length}
        rows.append(row(report, variant=f"{method}, best_of {best_of}, {blocks}", **labels))
    return rows


async def capacities(client: AsyncClient, size: Size, rows: list[Row]) -> dict[str, float]:
    """Requests a second at the reference concurrency, from the closed loop's rows or measured now."""
    found: dict[str, float] = {}
    for method in METHODS:
        known = [r["requests_per_s"] for r in rows if r["method"] == method and r["in_flight"] == size.reference]
        if not known:
            report = await closed_loop(
                client,
                PROMPTS,
                options(method, size),
                requests=2 * size.reference,
                concurrency=size.reference,
                stream=True,
                seed=0,
            )
            known = [report.completed_per_second]
        found[method] = known[0]
        if not known[0]:
            raise ClientError(f"no request with method {method} succeeded")
    return found


async def measure(given: argparse.Namespace, size: Size) -> list[CaseResult]:
    """All cases that were asked for."""
    cases: list[CaseResult] = []
    async with AsyncExitStack() as stack:
        url, alone = given.url, None
        if url is None:
            dlm, rm = given.dlm, given.rm
            if dlm is None:
                dlm, rm = write_pair(Path(stack.enter_context(tempfile.TemporaryDirectory())))
            threads = ["--threads", str(given.threads)]
            server = ["--model", str(dlm), "--reward-model", f"rm={rm}", "--dtype", "float32", "--device", "cpu"]
            if "overhead" in given.case:
                alone = await stack.enter_async_context(engine([*threads, "--dlm", str(dlm), "--rm", str(rm)]))
            url = await stack.enter_async_context(served([*threads, *server, "--log-level", "WARNING"]))
        client = await stack.enter_async_context(load_client(url, given.api_key))
        await closed_loop(client, PROMPTS, options("entrgi", size), requests=2, concurrency=2, stream=True, seed=9)
        rows: list[Row] = []
        if "closed" in given.case:
            rows = await closed(client, size)
            cases.append(CaseResult("closed", rows))
        if "open" in given.case:
            capacity = await capacities(client, size, rows)
            cases.append(CaseResult("open", await opened(client, size, capacity)))
        if "streams" in given.case:
            cases.append(CaseResult("streams", await streamed(client, size)))
        if "overhead" in given.case and alone is not None:
            steps, rounds = size.steps, size.rounds
            cases.append(await overhead(client, url, alone, max_tokens=size.max_tokens, steps=steps, rounds=rounds))
    return cases


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.online", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), help="default: all")
    form = made.add_mutually_exclusive_group()
    form.add_argument("--quick", action="store_true", help="short answers, few requests (the default)")
    form.add_argument("--full", action="store_true", help="the sizes that the claims are made for")
    made.add_argument("--url", help="a server that runs already, with a reward model; default: start one")
    made.add_argument("--api-key", help="of that server")
    made.add_argument("--dlm", type=Path, help="a diffusion checkpoint instead of the generated one")
    made.add_argument("--rm", type=Path, help="its reward model")
    made.add_argument(
        "--threads",
        type=int,
        default=max(1, (os.cpu_count() or 2) - 1),
        help="CPU threads of the worker, and of the engine without HTTP; default: all cores but one (%(default)s)",
    )
    made.add_argument("--out", type=Path, default=Path("build/bench"), help="for the JSON")
    return made


def main() -> int:
    """Measure, print tables, then one JSON line."""
    made = parser()
    given = made.parse_args()
    if (given.dlm is None) != (given.rm is None):
        made.error("--dlm and --rm go together")
    if given.url and given.case == ["overhead"]:
        made.error("the overhead is measured with a server of its own, not with --url")
    cases = asyncio.run(measure(given, FULL if given.full else QUICK))
    document: Row = {
        "bench": "online",
        "form": "full" if given.full else "quick",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": given.threads,
        "load_average": round(os.getloadavg()[0], 2),
    }
    show(cases, Console(width=200, highlight=False))
    print(json.dumps(keep(document, cases, given.out)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

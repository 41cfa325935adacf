"""`python -m tests.faults.scorers`: outside scorers that hang, answer slowly or wrongly, and die.

First the price of waiting: the same requests with and without eight jobs that are parked for a scorer that hangs, in
pairs that follow each other in either order, since a machine's speed changes. Their throughput must be within 5% (the
median of the pairs' ratios). What the server's processes computed for them tells the same on a machine that others use.
Then each kind of misbehaviour at once for eight requests, which must get the right status, and nobody else any other.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.faults.harness import Server, Verdict, main, seconds_until
from tests.faults.load import CHAT, bystander, chat, client
from tests.support.scorers import Answer, Stub, ok, stub

PARKED, AT_A_TIME = 8, 4
LEAST_SHARE = 0.95
BIG = 8 * 2**20
FUNCTION = "python:tests.support.scorers:scripted"
STATUSES: dict[str, set[int]] = {
    "good": {200}, "slow": {200}, "hang": {502, 503}, "500": {502, 503}, "few": {502}, "nan": {502}, "redirect": {502},
    "large": {502}, "gone": {502, 503}, "function die": {502, 503}, "function hang": {502, 503}, "function nan": {502},
    "function raise": {502}, "function good": {200},
}  # fmt: skip
"""What requests get by the kind of their scorer; 503 once it is left alone."""


def answer(made: Stub, path: str, body: Any) -> Answer:
    """Of a server of the kind that the first part of the path says."""
    kind, rows = path.split("/")[1], [{"index": index, "score": 1.0} for index in range(len(body["documents"]))]
    match kind:
        case "hanging" | "hang":
            made.released.wait()
        case "slow":
            time.sleep(1.0)
        case "500":
            return 500, {}, b""
        case "few":
            rows.pop()
        case "nan":
            return 200, {}, json.dumps({"data": [{**row, "score": float("nan")} for row in rows]}).encode()
        case "redirect":
            return 307, {"Location": f"{made.url}/good/v1/score"}, b""
        case "large":
            return 200, {}, b" " * BIG
    return ok({"data": rows})


def scorers(url: str) -> list[str]:
    """The flags that name them all."""
    patient = {"name": "hanging", "target": f"entrgi+{url}/hanging", "timeout_seconds": 3600}
    named: list[dict[str, Any]] = [patient]
    for kind in STATUSES:
        target = FUNCTION if kind.startswith("function") else f"entrgi+{url}/{kind}"
        target = "entrgi+http://127.0.0.1:9" if kind == "gone" else target
        named.append({"name": kind.replace(" ", "-"), "target": target, "timeout_seconds": 3, "retries": 1})
    return [word for each in named for word in ("--scorers", json.dumps(each))]


def scored(seed: int, name: str, **fields: Any) -> dict[str, Any]:
    """A short request that a scorer judges at its end."""
    return chat(seed, max_tokens=4, best_of=1, guidance={"method": "bon", "reward_model": name}, **fields)


@asynccontextmanager
async def parked(server: Server) -> AsyncIterator[None]:
    """So many jobs that wait for the scorer that hangs, in the block."""
    async with client(server) as http:
        waiting = [asyncio.create_task(http.post(CHAT, json=scored(seed, "hanging"))) for seed in range(PARKED)]
        await seconds_until(lambda: server.metric("num_requests_parked") == PARKED)
        yield
        for each in waiting:
            each.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
    await seconds_until(lambda: server.metric("num_requests_parked") == 0)


def computed(server: Server) -> float:
    """Seconds of a processor that the server's processes have used."""
    ticks = 0
    for pid in (server.process.pid, *server.worker_pids().values()):
        ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


async def block(server: Server, http: httpx.AsyncClient, requests: int) -> tuple[float, float]:
    """How long so many requests take, a few at a time, and the seconds that the server computed for them."""
    seeds = iter(range(requests))

    async def some() -> None:
        for seed in seeds:
            (await http.post(CHAT, json=chat(seed, max_tokens=32, diffusion={"steps": 32}))).raise_for_status()

    before, began = computed(server), time.perf_counter()
    await asyncio.gather(*(some() for _ in range(AT_A_TIME)))
    return time.perf_counter() - began, computed(server) - before


async def price(server: Server, verdict: Verdict, pairs: int, requests: int) -> None:
    """The pairs, and what they say."""
    alone, beside = [], []
    async with client(server) as http:
        await block(server, http, requests)
        for pair in range(pairs):
            for jobs_wait in (pair % 2 == 0, pair % 2 == 1):
                if jobs_wait:
                    async with parked(server):
                        beside.append(await block(server, http, requests))
                else:
                    alone.append(await block(server, http, requests))
    seconds, work = ([one[what] / other[what] for one, other in zip(alone, beside, strict=True)] for what in (0, 1))
    rates = [requests / statistics.median(took for took, _ in blocks) for blocks in (alone, beside)]
    share, quartiles = statistics.median(seconds), statistics.quantiles(seconds, n=4)
    seen = f"{share:.3f} (quartiles {quartiles[0]:.3f}, {quartiles[2]:.3f}); {rates[0]:.1f} -> {rates[1]:.1f} a second"
    verdict.promise(f"throughput beside {PARKED} parked jobs: at least {LEAST_SHARE:g}", share >= LEAST_SHARE, seen)
    verdict.figures |= {"throughput_share": round(share, 4), "pairs": pairs, "requests": requests}
    verdict.figures["computed_share"] = round(statistics.median(work), 4)


async def misbehave(server: Server, verdict: Verdict) -> None:
    """Every kind of scorer at once, beside a client that has nothing to do with them."""
    kinds = [kind for kind in STATUSES for _ in range(PARKED)]

    async def one(http: httpx.AsyncClient, seed: int, kind: str) -> tuple[str, int]:
        told = {"metadata": {"do": kind.partition(" ")[2]}} if kind.startswith("function") else {}
        response = await http.post(CHAT, json=scored(seed, kind.replace(" ", "-"), **told))
        if response.status_code in (502, 503) and kind.replace(" ", "-") not in response.text:
            return kind, 0  # it does not say whose fault it is
        return kind, response.status_code

    async with bystander(server, verdict, "scorers that fail"), client(server) as http:
        outcomes = Counter(await asyncio.gather(*(one(http, seed, kind) for seed, kind in enumerate(kinds))))
    for kind, right in STATUSES.items():
        got = {status: count for (of, status), count in outcomes.items() if of == kind}
        verdict.promise(f"{kind}: {' or '.join(map(str, sorted(right)))}", set(got) <= right, got)


async def run(server: Server, pairs: int, requests: int) -> int:
    """The price, then the faults."""
    verdict = Verdict("scorers")
    await price(server, verdict, pairs, requests)
    await misbehave(server, verdict)
    return verdict.close(server, await server.seconds_until_idle())


if __name__ == "__main__":
    with stub(lambda path, body: answer(made, path, body)) as made:
        main(__doc__, run, "--max-queue", "512", *scorers(made.url), pairs=20, requests=24)

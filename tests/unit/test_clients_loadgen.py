"""The load generator: Poisson arrivals, percentiles, and a loop that stays open when the server is slow."""

from __future__ import annotations

import asyncio
import json

import httpx
import numpy as np
import pytest
from scipy import stats

from clients import AsyncClient, RetryPolicy
from clients.loadgen import Outcome, arrivals, closed_loop, generate_load, percentile, summarise


def test_arrivals_are_a_poisson_process() -> None:
    times = np.array(arrivals(rate=5.0, count=20_000, seed=1))
    gaps = np.diff(times, prepend=0.0)
    assert stats.kstest(gaps, "expon", args=(0, 1 / 5.0)).pvalue > 1e-3
    counts = np.histogram(times, bins=np.arange(0, times[-1], 1.0))[0]
    assert counts.var() == pytest.approx(counts.mean(), rel=0.1)
    assert arrivals(5.0, 10, seed=1) == list(times[:10])


@pytest.mark.parametrize("q", [1, 50, 90, 99, 100])
def test_percentile_is_numpys_inverted_cdf(q: float) -> None:
    values = np.random.default_rng(0).normal(size=173)
    assert percentile(list(values), q) == np.percentile(values, q, method="inverted_cdf")


async def test_a_stalled_server_does_not_hold_back_departures() -> None:
    """Every request has left before the first one is answered."""
    arrived = 0
    release = asyncio.Event()

    async def server(request: httpx.Request) -> httpx.Response:
        nonlocal arrived
        arrived += 1
        if arrived == 30:
            release.set()
        await release.wait()
        if b'"seed":7' in request.content:
            return httpx.Response(429, json={"error": {"message": "full"}}, headers={"retry-after": "1"})
        return httpx.Response(200, json={"id": "c", "model": "m", "choices": [], "usage": {"completion_tokens": 3}})

    times = arrivals(rate=1000.0, count=30, seed=0)
    async with AsyncClient("http://s", retry=RetryPolicy(retries=0), transport=httpx.MockTransport(server)) as client:
        report = await generate_load(client, ["a", "b"], {}, times, stream=False, seed=0)
    assert report.outcomes == {"429": 1, "ok": 29}
    assert report.tokens_per_second == pytest.approx(29 * 3 / report.seconds)


async def test_a_closed_loop_has_as_many_in_flight_as_clients_and_no_more() -> None:
    in_flight = most = 0
    seeds = []

    async def server(request: httpx.Request) -> httpx.Response:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        seeds.append(json.loads(request.content)["seed"])
        await asyncio.sleep(0.001)
        in_flight -= 1
        return httpx.Response(200, json={"id": "c", "model": "m", "choices": [], "usage": {"completion_tokens": 2}})

    async with AsyncClient("http://s", retry=RetryPolicy(retries=0), transport=httpx.MockTransport(server)) as client:
        report = await closed_loop(client, ["a"], {}, requests=40, concurrency=4, stream=False, seed=100)
    assert most == 4
    assert sorted(seeds) == list(range(100, 140))
    assert report.outcomes == {"ok": 40}
    assert report.offered_per_second is None
    assert report.tokens_per_second == pytest.approx(80 / report.seconds)


def test_failures_count_in_the_outcomes_and_not_in_the_latencies() -> None:
    outcomes = [Outcome("ok", 0.0, 1.0, tokens=10), Outcome("ok", 0.0, 3.0, tokens=10), Outcome("429", 0.5, 0.01)]
    report = summarise(outcomes, offered=1.5, seconds=4.0)
    assert report.outcomes == {"429": 1, "ok": 2}
    assert report.latencies["latency"]["max"] == 3.0
    assert report.latencies["latency"]["p50"] == 1.0
    assert report.latencies["late departure"]["max"] == 0.5
    assert (report.completed_per_second, report.tokens_per_second) == (0.5, 5.0)
    assert "first text" not in report.latencies

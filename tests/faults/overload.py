"""`python -m tests.faults.overload --minutes 5`: four times the load that the server can carry, then silence.

First the sustainable rate is measured: requests a second when as many are in flight as the queue takes. Then requests
arrive at four times that rate, whether or not earlier ones have been answered. Nothing may break; who is accepted must
be answered within the time that a full queue implies; who is refused must be told a sensible time. Last, a crowd of
three times the queue comes at once and does as told: it must be served at about the full rate and in few attempts.

When `Retry-After` is roughly right: it names the time of the next place that nobody was promised. Two things are
checked of it against the completions that were seen. A place did come free before that time; and the time is at most
twice that in which as many requests left as were in flight, that is, in which every place was given anew.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import statistics
import time
from bisect import bisect_left, bisect_right
from collections import Counter
from dataclasses import dataclass, field

from tqdm import tqdm

from tests.faults import hostile
from tests.faults.harness import Server, Verdict, main, percentile, quantiles
from tests.faults.load import CHAT, bystander, chat

QUEUE = 64
DECODING = {"max_tokens": 64, "diffusion": {"steps": 64}}
"""Requests long enough that decoding is the load: with short ones a fast worker is offered hundreds of connections a
second, and what is measured is how long they take to be accepted."""
TIMES_TOO_MUCH = 4.0
MEASURE_SECONDS = 20.0
WORST_HEALTH_SECONDS = 1.0  # on a machine that is busy with the load itself


@dataclass
class Traffic:
    """What happened to requests; times in seconds of `time.perf_counter`."""

    server: Server
    statuses: Counter[int] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)  # of accepted ones, from their departure
    lateness: list[float] = field(default_factory=list)  # of departures: the load generator's own delay
    completions: list[float] = field(default_factory=list)
    refusals: list[tuple[float, float]] = field(default_factory=list)  # when, and the seconds of Retry-After
    malformed: list[str] = field(default_factory=list)

    async def send(self, seed: int, due: float | None = None) -> float | None:
        """One request, on a connection of its own; returns the seconds of Retry-After when refused."""
        departed = time.perf_counter()
        self.lateness.append(departed - due if due is not None else 0.0)
        request = hostile.post(json.dumps(chat(seed, **DECODING)).encode(), "Connection: close", path=CHAT)
        try:
            reply = await hostile.exchange(self.server.port, request, seconds=300)
        except (OSError, TimeoutError) as error:
            self.statuses[0] += 1
            self.malformed.append(repr(error))
            return None
        now = time.perf_counter()
        self.statuses[reply.status] += 1
        if reply.status == 200:
            self.latencies.append(now - departed)
            self.completions.append(now)
            return None
        wait = reply.headers.get("retry-after", "")
        if reply.status == 429 and wait.isdigit() and hostile.fault(reply) is None:
            self.refusals.append((now, float(wait)))
            return self.refusals[-1][1]
        self.malformed.append(f"{reply.status} {reply.body[:200]!r}")
        return None


async def closed_loop(server: Server, concurrency: int, seconds: float) -> float:
    """Answers a second with this many requests always in flight."""
    traffic = Traffic(server)
    started = time.perf_counter()

    async def user(number: int) -> None:
        seed = number
        while time.perf_counter() - started < seconds:
            await traffic.send(seed)
            seed += concurrency

    await asyncio.gather(*map(user, range(concurrency)))
    # Without the ends, where the batch is filling or emptying.
    inner = [t for t in traffic.completions if started + 0.2 * seconds <= t <= started + seconds]
    return len(inner) / (0.8 * seconds)


async def open_loop(server: Server, rate: float, seconds: float, seed: int) -> Traffic:
    """Poisson arrivals at `rate` a second, none of which wait for others."""
    generator = random.Random(seed)
    traffic = Traffic(server)
    sent: set[asyncio.Task[float | None]] = set()
    due = started = time.perf_counter()
    with tqdm(total=round(seconds), unit="s", desc="overload", mininterval=2) as bar:
        while due - started < seconds:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            task = asyncio.create_task(traffic.send(generator.randrange(1000), due))
            sent.add(task)
            task.add_done_callback(sent.discard)
            due += generator.expovariate(rate)
            bar.update(min(round(due - started), bar.total) - bar.n)
    await asyncio.gather(*sent)
    return traffic


async def crowd(server: Server, size: int, seed: int) -> tuple[float, list[int]]:
    """That many clients at once, each of which comes back when told; the seconds until the last has its answer, and how
    often each had to ask."""
    traffic = Traffic(server)
    generator = random.Random(seed)
    started = time.perf_counter()

    async def one(number: int) -> int:
        attempts = 1
        while (wait := await traffic.send(number)) is not None:
            await asyncio.sleep(wait * generator.uniform(1.0, 1.1))  # as clients do, so as not to come in step
            attempts += 1
        return attempts

    attempts = await asyncio.gather(*map(one, range(size)))
    if traffic.malformed:
        raise RuntimeError(traffic.malformed[0])
    return time.perf_counter() - started, attempts


def answered_meanwhile(traffic: Traffic) -> list[int]:
    """For each accepted request, how many were answered between its departure and its answer. Unlike seconds, this does
    not depend on how fast the machine happens to be at the moment: a queue of N places lets about N go before."""
    completions = sorted(traffic.completions)
    return [
        bisect_left(completions, done) - bisect_right(completions, done - latency)
        for done, latency in zip(traffic.completions, traffic.latencies, strict=True)
    ]


def judge_retry_after(traffic: Traffic, in_flight: int) -> tuple[float, float, float]:
    """Over the refusals whose future was seen: the share before whose time a place came free; the share that was not
    longer than twice (and a second more than) the time for all places to be given anew; the median of the ratio of the
    two times."""
    free_before, not_too_long, ratios = 0, 0, []
    completions = sorted(traffic.completions)
    for when, wait in traffic.refusals:
        index = bisect_right(completions, when)
        if index + in_flight > len(completions):
            continue  # all places were not given anew any more
        free_before += completions[index] - when <= wait
        turnover = completions[index + in_flight - 1] - when
        not_too_long += wait <= 2.0 * turnover + 1.0
        ratios.append(wait / turnover)
    judged = max(len(ratios), 1)
    return free_before / judged, not_too_long / judged, statistics.median(ratios) if ratios else math.nan


async def run(server: Server, minutes: float, seed: int) -> int:
    """The three parts and the verdict."""
    verdict = Verdict("overload")
    await closed_loop(server, 4, 3.0)  # warm
    rate = await closed_loop(server, QUEUE, MEASURE_SECONDS)
    async with bystander(server, verdict, "overload") as health:
        traffic = await open_loop(server, TIMES_TOO_MUCH * rate, 60 * minutes, seed)
    idle = await server.seconds_until_idle()
    served_rate = len(traffic.completions) / (traffic.completions[-1] - traffic.completions[0])
    crowd_seconds, attempts = await crowd(server, 3 * QUEUE, seed)
    crowd_rate = len(attempts) / crowd_seconds
    idle_again = await server.seconds_until_idle()

    before = percentile([float(count) for count in answered_meanwhile(traffic)], 99)
    free_before, not_long, ratio = judge_retry_after(traffic, QUEUE)
    verdict.figures = {
        "offered_per_second": round(sum(traffic.statuses.values()) / (60 * minutes), 2),
        "accepted_latency_seconds": quantiles(traffic.latencies, 50, 90, 99, 100),
        "full_queue_seconds": round(QUEUE / served_rate, 2),
        "retry_after_seconds": quantiles([wait for _, wait in traffic.refusals], 0, 50, 99, 100),
    }
    late, slowest, mean = percentile(traffic.lateness, 99), percentile(health, 99), statistics.mean(attempts)
    rates, crowd_rates = f"{served_rate:.1f} of {rate:.1f}/s", f"{crowd_rate:.1f} of {served_rate:.1f}/s"
    for promise, kept, seen in (
        ("the load generator kept its times (p99)", late <= 1.0, f"{late:.2f} s late"),
        ("nothing but 200 and 429", set(traffic.statuses) <= {200, 429}, dict(traffic.statuses)),
        ("every refusal is the error object with Retry-After", not traffic.malformed, traffic.malformed[:2]),
        ("refused at all", traffic.statuses[429] > 0, traffic.statuses[429]),
        ("no more than 1.25 queues were answered before an accepted one (p99)", before <= 1.25 * QUEUE, before / QUEUE),
        ("overload does not lower the rate by half", served_rate >= 0.5 * rate, rates),
        ("a place came free before Retry-After (95%)", free_before >= 0.95, f"{free_before:.1%}"),
        (
            "Retry-After at most twice all places' turnover (90%)",
            not_long >= 0.9,
            f"{not_long:.1%}, median {ratio:.2f}",
        ),
        ("/health p99 during the overload", slowest <= WORST_HEALTH_SECONDS, f"{slowest * 1000:.0f} ms"),
        ("an obedient crowd is served at half the rate or more", crowd_rate >= 0.5 * served_rate, crowd_rates),
        ("an obedient crowd asks 3 times or less on average", mean <= 3, f"{mean:.2f}, at most {max(attempts)}"),
    ):
        verdict.promise(promise, kept, seen)
    return verdict.close(server, max(idle, idle_again))


if __name__ == "__main__":
    main(__doc__, run, "--max-queue", str(QUEUE), minutes=5.0, seed=0)

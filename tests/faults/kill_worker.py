"""`python -m tests.faults.kill_worker`: kill -9 of a worker, twenty times at random moments, under load through HTTP.

First every request of a catalogue is answered by an undisturbed server. Then a dozen clients send them over and over
while workers are killed. Promised: every request gets exactly one answer, and it is the undisturbed one to the token
(or a 503, when two workers died while they computed for it alone); the server is ready again within ten seconds each
time. Kills from outside cost nearly nothing: a request is lost only when two of them hit it while it runs alone, for
which one kill in ten is allowed to be the second.

The models run in float64: there the batch around a request cannot tip a near tie, so "the same tokens" means just that.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from tests.faults.harness import Server, Verdict, client, options, quantiles, seconds_until_idle, served
from tests.faults.load import Load, catalogue

READY_SECONDS = 10.0
KILLS_A_LOSS = 10  # for every so many kills one request may be lost
LIMIT_SECONDS = 120.0


@dataclass(frozen=True)
class Kill:
    """One kill: how long after the worker was ready, requests in flight, seconds until the server could take work and
    until the worker's successor was ready; the machine's load average."""

    worker: int
    after_ready: float
    in_flight: int
    server_ready: float
    worker_ready: float
    load1: float


def ready_workers(server: Server) -> dict[int, int]:
    """The process of each worker that was last said to be ready, from the server's log."""
    pids: dict[int, int] = {}
    for line in server.log.read_text("utf-8").splitlines():
        message = json.loads(line)["message"] if line.startswith("{") else ""
        if message.startswith("worker ") and message.endswith(") is ready"):
            words = message.replace("(", "").replace(")", "").split()
            pids[int(words[1])] = int(words[3])
    return pids


async def restarts_and_ready(http: httpx.AsyncClient) -> tuple[float, dict[int, bool]]:
    """`worker_restarts_total` and `worker_ready`, of one moment."""
    restarts, ready = 0.0, {}
    for family in text_string_to_metric_families((await http.get("/metrics")).text):
        for sample in family.samples:
            if sample.name == "entrgi:worker_restarts_total":
                restarts = sample.value
            elif sample.name == "entrgi:worker_ready":
                ready[int(sample.labels["worker"])] = bool(sample.value)
    return restarts, ready


async def kill_one(server: Server, http: httpx.AsyncClient, load: Load, worker: int, after_ready: float) -> Kill:
    """Kill a worker and wait for its successor."""
    before, _ = await restarts_and_ready(http)
    pid = ready_workers(server)[worker]
    in_flight = load.in_flight
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    server_ready = math.inf
    while time.monotonic() < killed + LIMIT_SECONDS:
        restarts, ready = await restarts_and_ready(http)
        if restarts > before or not ready[worker]:  # the death has been noticed
            if any(ready.values()) and server_ready == math.inf:
                server_ready = time.monotonic() - killed
            if restarts > before and ready[worker]:
                return Kill(worker, after_ready, in_flight, server_ready, time.monotonic() - killed, os.getloadavg()[0])
        await asyncio.sleep(0.02)
    raise RuntimeError(f"worker {worker} did not come back within {LIMIT_SECONDS} seconds")


async def attack(server: Server, load: Load, kills: int, gap: float, workers: int, seed: int) -> list[Kill]:
    """Kill at random moments, 0 to `gap` seconds after all was well, while the load runs."""
    generator = random.Random(seed)
    running = asyncio.create_task(load.run())
    done: list[Kill] = []
    console = Console(stderr=True, highlight=False)
    async with client(server) as http:
        for number in range(kills):
            pause = generator.uniform(0.0, gap)
            await asyncio.sleep(pause)
            done.append(await kill_one(server, http, load, generator.randrange(workers), pause))
            console.print(f"kill {number + 1} of {kills}: {done[-1]}, {load.outcomes}")
    load.stopped = True
    await running
    return done


def main() -> int:
    """Run it; 0 when every promise was kept."""
    given = options(__doc__, kills=20, clients=12, gap=20.0, data_parallel=1, no_spare=False, seed=0, log=Path())
    flags = ["--dtype", "float64", "--device", "cpu", "--data-parallel", str(given.data_parallel)]
    flags += ["--no-spare-worker" if given.no_spare else "--spare-worker"]
    verdict = Verdict("kill_worker")
    with served(*flags) as server:
        load = Load(server, catalogue(4, given.seed, fates=(1, 0, 0)), given.clients, given.seed)

        async def run() -> tuple[list[Kill], float]:
            await load.learn()
            kills = await attack(server, load, given.kills, given.gap, given.data_parallel, given.seed)
            return kills, await seconds_until_idle(server)

        kills, idle_after = asyncio.run(run())
        if given.log.name:
            given.log.write_bytes(server.log.read_bytes())
        killed = sum("ended with signal 9" in line for line in server.errors_logged())
        alive = server.process.poll() is None
    outcomes = load.outcomes
    slowest = max(kill.server_ready for kill in kills)
    lost = outcomes["503 unavailable"] + outcomes["stream unavailable"]
    other = {name: count for name, count in outcomes.items() if name != "right" and "unavailable" not in name}
    answered = sum(count for name, count in outcomes.items() if name in ("right", "wrong") or " " in name)
    verdict.promise("every request got exactly one answer", answered == load.sent, f"{load.sent} sent, {outcomes}")
    verdict.promise("every answer is the undisturbed one, to the token", not load.wrong, load.wrong[:3])
    verdict.promise("no failure but 503", not other, other)
    allowed = given.kills // KILLS_A_LOSS
    verdict.promise(f"at most {allowed} lost to {given.kills} kills", lost <= allowed, f"{lost} of {load.sent} lost")
    verdict.promise(f"ready again within {READY_SECONDS:g} s", slowest <= READY_SECONDS, f"{slowest:.2f} s at most")
    verdict.promise("as many deaths as kills", killed == given.kills, killed)
    verdict.promise("the server lives and is idle afterwards", alive and idle_after < math.inf, f"{idle_after:.1f} s")
    verdict.figures = {
        "kills": [asdict(kill) for kill in kills],
        "ready_seconds": quantiles([kill.server_ready for kill in kills], 50, 90, 100),
        "latency_seconds": quantiles(load.latencies, 50, 90, 99, 100),
    }
    return verdict.close()


if __name__ == "__main__":
    sys.exit(main())

"""`python -m tests.faults.kill_worker`: kill -9 of a worker, twenty times at random moments, under load through HTTP.

First every request of a catalogue is answered by an undisturbed server. Then a dozen clients send them over and over
while workers are killed. Promised: every request gets exactly one answer, and it is the undisturbed one to the token
(or, after the second death of a worker that was computing for it, a 503); the server is ready again within ten seconds
each time. A kill costs at most one request, and all together no more than chance makes unavoidable at such a rate of
kills (`tests/faults/kill_exposure.py` has the arithmetic, and why the share of all requests says little).

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
from rich.table import Table

from tests.faults.harness import Server, Verdict, client, parser, percentile, seconds_until_idle, served
from tests.faults.kill_exposure import expected_losses, exposure, seconds_alone
from tests.faults.kill_load import Load, catalogue

READY_SECONDS = 10.0
DEVIATIONS = 2.0  # by which losses may exceed their expectation
SLOWER = 1.5  # than on the undisturbed server a suspect may be, beside a spare worker that starts
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
            console.print(
                f"kill {number + 1} of {kills}: ready again in {done[-1].server_ready:.2f} s, {load.outcomes}"
            )
    load.stop()
    await running
    return done


def show(kills: list[Kill]) -> None:
    """The table of kills."""
    columns = ("kill", "worker", "s after ready", "in flight", "server ready (s)", "worker ready (s)", "load average")
    table = Table(*columns, title="kills")
    for number, kill in enumerate(kills, 1):
        values = (kill.after_ready, kill.server_ready, kill.worker_ready, kill.load1)
        after, server, worker, load1 = (f"{value:.2f}" for value in values)
        table.add_row(str(number), str(kill.worker), after, str(kill.in_flight), server, worker, load1)
    Console(highlight=False, width=140).print(table)


def main() -> int:
    """Run it; 0 when every promise was kept."""
    arguments = parser(__doc__)
    arguments.add_argument("--kills", type=int, default=20)
    arguments.add_argument("--clients", type=int, default=12)
    arguments.add_argument("--cases", type=int, default=60, help="different requests; default: %(default)s")
    arguments.add_argument("--longest", type=int, default=32, help="most tokens of a request; default: %(default)s")
    arguments.add_argument("--gap", type=float, default=20.0, help="most seconds between ready and the next kill")
    arguments.add_argument("--data-parallel", type=int, default=1)
    arguments.add_argument("--no-spare", action="store_true", help="without a spare worker")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--log", type=Path, help="where to keep the server's log")
    given = arguments.parse_args()
    flags = ["--dtype", "float64", "--device", "cpu", "--data-parallel", str(given.data_parallel)]
    flags += ["--no-spare-worker" if given.no_spare else "--spare-worker"]
    verdict = Verdict("kill_worker")
    with served(*flags) as server:
        load = Load(server, catalogue(given.cases, given.seed, given.longest), given.clients, given.seed)

        async def run() -> tuple[list[Kill], float, float]:
            await load.learn()
            alone = seconds_alone(await load.alone())
            kills = await attack(server, load, given.kills, given.gap, given.data_parallel, given.seed)
            return kills, await seconds_until_idle(server), alone

        started = time.monotonic()
        kills, idle_after, alone = asyncio.run(run())
        seconds = time.monotonic() - started
        if given.log:
            given.log.write_bytes(server.log.read_bytes())
        exposed = exposure(server.log.read_text("utf-8").splitlines())
        killed = sum("ended with signal 9" in line for line in server.errors_logged())
        alive = server.process.poll() is None
    show(kills)
    outcomes = load.outcomes
    slowest = max(kill.server_ready for kill in kills)
    lost = outcomes["503 unavailable"] + outcomes["stream unavailable"]
    other = {name: count for name, count in outcomes.items() if name != "right" and "unavailable" not in name}
    answered = sum(count for name, count in outcomes.items() if name in ("right", "wrong") or " " in name)
    verdict.promise("every request got exactly one answer", answered == load.sent, f"{load.sent} sent, {outcomes}")
    verdict.promise("every answer is the undisturbed one, to the token", not load.wrong, load.wrong[:3])
    verdict.promise("no failure but 503 after a second death", not other, other)
    worst, convicted = max(exposed.convicted, default=0), sum(exposed.convicted)
    verdict.promise(
        "a kill costs at most one request, and only requests in a second death",
        worst <= 1 and lost == convicted,
        f"{lost} of {load.sent} lost, {convicted} convicted",
    )
    after = exposed.suspects[:-1]
    expected, deviation = expected_losses(after, exposed.seconds_a_suspect, given.gap, given.data_parallel)
    verdict.promise(
        f"as few as chance allows, within {DEVIATIONS:g} standard deviations",
        lost <= expected + DEVIATIONS * deviation,
        f"{lost}, expected {expected:.1f} +- {deviation:.1f}",
    )
    verdict.promise(
        f"suspects run at most {SLOWER:g} times as long as undisturbed ones alone",
        exposed.ran > 0 and exposed.seconds_a_suspect <= SLOWER * alone,
        f"{exposed.ran} ran {exposed.seconds_a_suspect:.2f} s each, undisturbed {alone:.2f} s",
    )
    verdict.promise(f"ready again within {READY_SECONDS:g} s", slowest <= READY_SECONDS, f"{slowest:.2f} s at most")
    verdict.promise("as many deaths as kills", killed == given.kills, killed)
    verdict.promise("the server lives and is idle afterwards", alive and idle_after < math.inf, f"{idle_after:.1f} s")
    verdict.figures = {
        "kills": [asdict(kill) for kill in kills],
        "sent": load.sent,
        "outcomes": dict(outcomes),
        "suspects": after,
        "seconds_alone": alone,
        "seconds_a_suspect": exposed.seconds_a_suspect,
        "lost": {"seen": lost, "expected": expected, "deviation": deviation, "share": lost / load.sent},
        "ready_seconds": {f"p{q}": percentile([kill.server_ready for kill in kills], q) for q in (50, 90, 100)},
        "latency_seconds": {f"p{q}": percentile(load.latencies, q) for q in (50, 90, 99, 100)},
        "clients": given.clients,
        "data_parallel": given.data_parallel,
        "spare": not given.no_spare,
        "seconds": seconds,
    }
    return verdict.close()


if __name__ == "__main__":
    sys.exit(main())

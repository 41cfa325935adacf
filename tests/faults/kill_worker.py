"""`python -m tests.faults.kill_worker`: kill -9 of a worker, twenty times at random moments, under load through HTTP.

First every request of a catalogue is answered by an undisturbed server. Then a dozen clients send them over and over
while workers are killed. Promised: every request gets exactly one answer, and it is the undisturbed one to the token
(or a 503, when two workers died while they computed for it alone); the server is ready again within ten seconds each
time. Kills from outside cost nearly nothing: a request is lost only when two of them hit it while it runs alone, for
which one kill in ten is allowed to be the second.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import signal

from tqdm import tqdm

from tests.faults.harness import Server, Verdict, main, quantiles, seconds_until
from tests.faults.load import EXACT, Load, catalogue

READY_SECONDS = 10.0
KILLS_A_LOSS = 10  # for every so many kills one request may be lost


async def end_worker(server: Server, worker: int, how: signal.Signals) -> tuple[float, float]:
    """Send a signal that ends a worker at once or lets it be found; seconds until the server could take work after it
    had noticed, and until the worker's successor was ready."""
    before, _ = await asyncio.to_thread(server.workers)

    def able(replaced: bool = False) -> bool:
        restarts, ready = server.workers()
        return (restarts > before and ready[worker]) or (not (replaced or ready[worker]) and any(ready.values()))

    os.kill(server.worker_pids()[worker], how)
    able_after = await seconds_until(able, pause=0.02)
    return able_after, able_after + await seconds_until(lambda: able(replaced=True), pause=0.02)


async def run(server: Server, kills: int, clients: int, gap: float, seed: int) -> int:
    """Kill at random moments, 0 to `gap` seconds after all was well, while the load runs."""
    generator = random.Random(seed)
    load = Load(server, catalogue(4, seed, fates=(1, 0, 0)), clients, seed)
    await load.learn()
    ready_after: list[float] = []
    async with load.running():
        for _ in (bar := tqdm(range(kills), desc="kills")):
            await asyncio.sleep(generator.uniform(0.0, gap))
            able, replaced = await end_worker(server, generator.choice(sorted(server.worker_pids())), signal.SIGKILL)
            if replaced == math.inf:
                raise RuntimeError("a killed worker has no successor")
            ready_after.append(able)
            bar.set_postfix(load.outcomes)
    idle = await server.seconds_until_idle()
    died = sum("ended with signal 9" in line for line in server.errors_logged())
    outcomes = load.outcomes
    lost = outcomes["503 worker_lost"] + outcomes["stream worker_lost"]
    other = {name: count for name, count in outcomes.items() if name != "right" and "worker_lost" not in name}
    answered = sum(count for name, count in outcomes.items() if name in ("right", "wrong") or " " in name)
    allowed = kills // KILLS_A_LOSS
    slowest = max(ready_after, default=0.0)
    verdict = Verdict("kill_worker", latency_seconds=quantiles(load.latencies, 50, 90, 99, 100))
    verdict.promise("every request got exactly one answer", answered == load.sent, f"{load.sent} sent, {outcomes}")
    verdict.promise("every answer is the undisturbed one, to the token", not load.wrong, load.wrong[:3])
    verdict.promise("no failure but 503", not other, other)
    verdict.promise(f"at most {allowed} lost to {kills} kills", lost <= allowed, f"{lost} of {load.sent} lost")
    verdict.promise(
        f"ready again within {READY_SECONDS:g} s", slowest <= READY_SECONDS, quantiles(ready_after, 50, 100)
    )
    verdict.promise("as many deaths as kills", died == kills, died)
    verdict.promise("the server is idle afterwards", idle < math.inf, f"{idle:.1f} s")
    return verdict.close()


if __name__ == "__main__":
    main(__doc__, run, *EXACT, "--spare-worker", kills=20, clients=12, gap=20.0, seed=0)

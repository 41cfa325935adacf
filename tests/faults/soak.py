"""`python -m tests.faults.soak --minutes 30`: everything at once for a long time, and nothing may add up.

Clients send, one request after the other, what a catalogue holds: every guidance method and algorithm, several
prompts, choices and reward models, infilling, streams, scores, rankings, and among them requests that are wrong, that
have no time, and that are given up half-way. Each request of the catalogue is seeded, so whatever comes back for it
must be what came back the first time. Memory, descriptors and threads of both processes are sampled throughout.
"""

from __future__ import annotations

import asyncio
from typing import Any

from tqdm import tqdm

from tests.faults.harness import Server, Verdict, main, quantiles, watched
from tests.faults.load import CHAT, COMPLETIONS, SCORE, Case, Load, catalogue


def mistakes() -> list[Case]:
    """Requests that are wrong, and what they must get."""
    bodies: tuple[dict[str, Any], ...] = (
        {"prompt": "Hi", "temperature": -1},
        {"prompt": "Hi", "unknown": 1},
        {"prompt": []},
        {"prompt": "word " * 3000},
        {"prompt": "Hi", "guidance": {"method": "entrgi", "eta": 99}},
        {"messages": [{"role": "user", "content": "Hi"}]},
    )
    return [
        *(Case(COMPLETIONS, body, 400) for body in bodies),
        Case(CHAT, {"model": "none such", "messages": [{"role": "user", "content": "Hi"}]}, 404),
        Case(SCORE, {"queries": "a", "documents": []}, 400),
    ]


async def run(server: Server, minutes: float, users: int, seed: int) -> int:
    """The soak and its verdict."""
    load = Load(server, [*catalogue(12, seed), *mistakes()], users, seed)
    async with watched(server, 5.0) as samples:
        async with load.running():
            for _ in (bar := tqdm(range(round(60 * minutes)), unit="s", mininterval=2)):
                await asyncio.sleep(1.0)
                bar.set_postfix(answers=len(load.requests), worker_mb=f"{samples[-1].worker_mb:.0f}")
        idle = await server.seconds_until_idle()
    lost = {name: count for name, count in load.outcomes.items() if name not in ("right", "cancelled", "hurried")}
    problems = [lost, *load.wrong[:3]] if lost else []
    figures = {"outcomes": dict(sorted(load.outcomes.items())), "latency_seconds": quantiles(load.latencies, 50, 99)}
    verdict = Verdict("soak", **figures)
    verdict.flat(samples)
    verdict.promise("no answer lost, doubled, mixed up or different", not problems, problems or len(load.requests))
    return verdict.close(server, idle)


if __name__ == "__main__":
    main(__doc__, run, minutes=30.0, users=12, seed=0)

"""`python -m tests.faults.fuzz --requests 10000`: malformed requests, from a seeded fuzzer, on every route.

A request may be refused, answered, or, where it is not whole, timed out; it may never get a 5xx, hang, or hurt anybody.
Every refusal must be OpenAI's error object. A known request is sent in between and must get its known answer. A case
that fails is told by its number: `--first N --requests 1` repeats it.
"""

from __future__ import annotations

import asyncio
from collections import Counter

from tqdm import tqdm

from tests.faults import hostile
from tests.faults.harness import Server, Verdict, main, watched
from tests.faults.load import bystander
from tests.faults.mutations import mutant

# Short limits, so that a request that is not whole, or that is valid and large by chance, is soon over.
FLAGS = (
    *("--slow-client-seconds", "2", "--request-timeout", "5", "--max-model-len", "256", "--batch-tokens", "2048"),
    *("--max-trajectories", "32"),
)
HANG_SECONDS = 60.0


async def run(server: Server, requests: int, at_once: int, seed: int, first: int) -> int:
    """All cases, and the verdict."""
    outcomes: Counter[str] = Counter()
    failed: list[str] = []
    verdict = Verdict("fuzz")
    cases = iter(tqdm(range(first, first + requests), desc="fuzz", mininterval=2))

    async def one_after_the_other() -> None:
        for index in cases:
            data = mutant(seed, index)
            try:
                reply = await hostile.exchange(server.port, data, HANG_SECONDS)
            except TimeoutError:
                wrong: str | None = "hang"
            else:
                outcomes[str(reply.status or "closed without an answer")] += 1
                wrong = hostile.fault(reply, with_body=not data.startswith(b"HEAD "))
            if wrong is not None:
                failed.append(f"case {index}: {wrong}")

    async with watched(server, 0.5) as samples:
        async with bystander(server, verdict, "fuzz"):
            await asyncio.gather(*(one_after_the_other() for _ in range(at_once)))
        idle = await server.seconds_until_idle()
    verdict.figures = {"outcomes": dict(sorted(outcomes.items())), "failed": failed[:20]}
    verdict.promise("no case got a wrong answer, or none", not failed, failed[:3] or requests)
    verdict.flat(samples)
    return verdict.close(server, idle)


if __name__ == "__main__":
    main(__doc__, run, *FLAGS, requests=10_000, at_once=16, seed=0, first=0)

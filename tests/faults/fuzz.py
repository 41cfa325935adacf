"""`python -m tests.faults.fuzz --requests 10000`: malformed requests, from a seeded fuzzer, on every route.

A request may be refused, answered, or, where it is not whole, timed out; it may never get a 5xx, hang, or hurt anybody.
Every refusal must be OpenAI's error object. A known request is sent in between and must get its known answer. A case
that fails is told by its number: `--first N --requests 1` repeats it.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter

import httpx
from tqdm import tqdm

from tests.faults import hostile
from tests.faults.harness import (
    Bystander,
    Server,
    Verdict,
    growth_percent,
    options,
    seconds_until_idle,
    served,
    tenths,
)
from tests.faults.mutations import mutant

# Short limits, so that a request that is not whole, or that is valid and large by chance, is soon over.
FLAGS = (
    *("--slow-client-seconds", "2", "--request-timeout", "5", "--max-model-len", "256", "--batch-tokens", "2048"),
    *("--max-trajectories", "32", "--log-level", "WARNING"),
)
HANG_SECONDS = 60.0
GROWTH_PERCENT = 3.0


class Fuzz:
    """The run's findings."""

    def __init__(self, server: Server, seed: int) -> None:
        self.server = server
        self.seed = seed
        self.outcomes: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.failed: list[str] = []

    async def send(self, index: int) -> None:
        """One case."""
        case = mutant(self.seed, index)
        self.kinds[case.kind] += 1
        try:
            reply = await hostile.exchange(self.server.port, case.data, HANG_SECONDS)
        except TimeoutError:
            wrong: str | None = "hang"
        else:
            self.outcomes[str(reply.status or "closed without an answer")] += 1
            wrong = hostile.fault(reply, with_body=not case.data.startswith(b"HEAD "))
        if wrong is not None:
            self.failed.append(f"case {index}: {wrong}")


async def run(server: Server, requests: int, at_once: int, seed: int, first: int) -> int:
    """All cases, and the verdict."""
    fuzz = Fuzz(server, seed)
    known = Bystander(server)
    front: list[float] = []
    worker: list[float] = []
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        await known.ask(http)
        with tqdm(total=requests, desc="fuzz", mininterval=2) as bar:
            for start in range(first, first + requests, at_once):
                indices = range(start, min(start + at_once, first + requests))
                await asyncio.gather(*map(fuzz.send, indices))
                await known.ask(http)
                usage = server.usage()
                front.append(usage.front_mb)
                worker.append(usage.worker_mb)
                bar.update(len(indices))
    idle = await seconds_until_idle(server)

    verdict = Verdict("fuzz")
    verdict.figures = {
        "seed": seed,
        "kinds": dict(sorted(fuzz.kinds.items())),
        "outcomes": dict(sorted(fuzz.outcomes.items())),
        "failed": fuzz.failed[:20],
    }
    verdict.promise("no case got a wrong answer, or none", not fuzz.failed, fuzz.failed[:3] or requests)
    verdict.bystander("the known request got its answer each time", known)
    for name, samples in (("front", front), ("worker", worker)):
        percent = growth_percent(samples)
        verdict.promise(f"memory of the {name} process flat within {GROWTH_PERCENT:g}%", percent <= GROWTH_PERCENT,
                        f"{percent:+.2f}%: {tenths(samples)}")  # fmt: skip
    return verdict.close(server, idle)


def main() -> int:
    """Parse, serve, fuzz."""
    given = options(__doc__, requests=10_000, at_once=16, seed=0, first=0)
    with served(*FLAGS) as server:
        return asyncio.run(run(server, given.requests, given.at_once, given.seed, given.first))


if __name__ == "__main__":
    sys.exit(main())

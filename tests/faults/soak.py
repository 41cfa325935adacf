"""`python -m tests.faults.soak --minutes 30`: everything at once for a long time, and nothing may add up.

Clients send, one request after the other, what a catalogue holds: every guidance method and algorithm, several
prompts, choices and reward models, infilling, streams, scores, rankings, and among them requests that are wrong, that
have no time, and that are given up half-way. Each request of the catalogue is seeded, so whatever comes back for it
must be what came back the first time. Memory, descriptors and threads of both processes are sampled throughout.
"""

from __future__ import annotations

import asyncio
import csv
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tests.faults.harness import (
    Server,
    Usage,
    Verdict,
    growth_percent,
    options,
    quantiles,
    seconds_until_idle,
    served,
    tenths,
)
from tests.faults.load import CHAT, COMPLETIONS, SCORE, Case, Load, catalogue

SAMPLE_SECONDS = 5.0
GROWTH_PERCENT = 3.0


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


async def sampled(load: Load, seconds: float) -> list[tuple[float, Usage]]:
    """Look at the processes for so long, and show how far we are; then let the load stop."""
    samples = []
    started = time.monotonic()
    with tqdm(total=round(seconds), unit="s", mininterval=2) as bar:
        while (passed := time.monotonic() - started) < seconds:
            samples.append((passed, usage := load.server.usage()))
            bar.update(round(passed) - bar.n)
            bar.set_postfix(answers=len(load.requests), front=f"{usage.front_mb:.0f}", worker=f"{usage.worker_mb:.0f}")
            await asyncio.sleep(SAMPLE_SECONDS)
    load.stopped = True
    return samples


async def run(server: Server, minutes: float, users: int, seed: int, samples_file: Path) -> int:
    """The soak and its verdict."""
    load = Load(server, [*catalogue(12, seed), *mistakes()], users, seed)
    samples, _ = await asyncio.gather(sampled(load, 60 * minutes), load.run())
    idle = await seconds_until_idle(server)
    await asyncio.sleep(2)
    samples.append((60 * minutes, server.usage()))
    if samples_file.name:
        write_samples(samples_file, samples)

    lost = {name: count for name, count in load.outcomes.items() if name not in ("right", "cancelled", "hurried")}
    problems = [lost, *load.wrong[:3]] if lost else []
    verdict = Verdict("soak")
    verdict.figures = {
        "minutes": minutes,
        "users": users,
        "outcomes": dict(sorted(load.outcomes.items())),
        "cases": len(load.cases),
        "latency_seconds": quantiles(load.latencies, 50, 99),
    }
    for name in ("front_mb", "worker_mb"):
        values = [getattr(usage, name) for _, usage in samples]
        growth = growth_percent(values)
        verdict.promise(f"{name} flat within {GROWTH_PERCENT:g}% after the first quarter", growth <= GROWTH_PERCENT,
                        f"{growth:+.2f}%: {tenths(values)}")  # fmt: skip
    for name in ("front_fds", "worker_fds", "front_threads", "worker_threads"):
        values = [getattr(usage, name) for _, usage in samples]
        # Descriptors of the HTTP process follow its connections; what is left at the end must be no more than at first.
        quarter = max(values[: max(1, len(values) // 4)])
        verdict.promise(f"{name}: no more at the end than in the first quarter", values[-1] <= quarter,
                        f"{values[-1]} <= {quarter}, {max(values)} at most")  # fmt: skip
    verdict.promise("no answer lost, doubled, mixed up or different", not problems, problems or len(load.requests))
    return verdict.close(server, idle)


def write_samples(path: Path, samples: list[tuple[float, Usage]]) -> None:
    """All samples as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["seconds", *asdict(samples[0][1])])
        writer.writeheader()
        writer.writerows({"seconds": round(seconds, 1), **asdict(usage)} for seconds, usage in samples)


def main() -> int:
    """Parse, serve, soak."""
    given = options(__doc__, minutes=30.0, users=12, seed=0, samples=Path())
    with served() as server:
        return asyncio.run(run(server, given.minutes, given.users, given.seed, given.samples))


if __name__ == "__main__":
    sys.exit(main())

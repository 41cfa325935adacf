"""`python -m tests.faults.soak --minutes 30`: everything at once for a long time, and nothing may add up.

Clients send, one request after the other, what a catalogue holds: every guidance method and algorithm, several
prompts, choices and reward models, infilling, streams, scores, rankings, and among them requests that are wrong, that
have no time, and that are given up half-way. Each request of the catalogue is seeded, so whatever comes back for it
must be what came back the first time. Memory, descriptors and threads of both processes are sampled throughout.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import json
import random
import sys
import time
import uuid
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from tests.faults.harness import (
    Server,
    Usage,
    Verdict,
    answer_of,
    client,
    growth_percent,
    joined,
    parser,
    percentile,
    seconds_until_idle,
    served,
    tenths,
)

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPTS = (
    "Write a short review of a hotel.",
    "What did you think of the phone?",
    "The book was",
    "Describe the restaurant that you tried, in a few words, and say what you would change about it if you could.",
)
METHODS = ("none", "bon", "expectation", "aps", "entrgi")
SAMPLE_SECONDS = 5.0
GROWTH_PERCENT = 3.0


@dataclass(frozen=True)
class Case:
    """One request of the catalogue and the status it must get. `fate`: answered; cancelled (the client goes at a random
    moment); hurried (its deadline is too short for a whole answer)."""

    path: str
    body: dict[str, Any]
    status: int = 200
    fate: str = "answered"

    @property
    def stream(self) -> bool:
        """Whether the answer comes as events."""
        return bool(self.body.get("stream"))


def catalogue(generator: random.Random) -> list[Case]:
    """About two hundred different requests, the expensive ones small."""
    cases: list[Case] = []

    def generate(**fields: Any) -> None:
        length = generator.choice((4, 8, 16, 24, 32))
        steps = generator.choice((4, 8, length))
        body: dict[str, Any] = {"seed": generator.randrange(2**31), "max_tokens": length, "return_token_ids": True}
        body |= {"temperature": generator.choice((0.0, 0.7, 1.0)), "diffusion": {"steps": steps}}
        for name, value in fields.items():
            body[name] = {**body.get(name, {}), **value} if isinstance(value, dict) else value
        prompt = generator.choice(PROMPTS)
        stream = generator.random() < 0.4
        body |= {"stream": True} if stream else {}
        if stream and generator.random() < 0.5:
            body["stream_canvas"] = True
        fate = generator.choices(("answered", "cancelled", "hurried"), (8, 1, 1))[0]
        if fate == "hurried":
            body["timeout"] = generator.choice((0.01, 0.05, 0.2))
        if "suffix" in body or generator.random() < 0.5:
            cases.append(Case(COMPLETIONS, {"prompt": prompt, **body}, fate=fate))
        else:
            cases.append(Case(CHAT, {"messages": [{"role": "user", "content": prompt}], **body}, fate=fate))

    for _ in range(12):
        for method in METHODS:
            guidance: dict[str, Any] = {"method": method}
            if method not in ("none", "bon"):
                guidance |= {"gradient_steps": generator.choice((1, 2, 3)), "eta": generator.choice((0.2, 0.5))}
            generate(guidance=guidance, **({} if method == "none" else {"best_of": generator.choice((1, 2, 3))}))
        generate(n=2)
        generate(stop=["the", "."])
        generate(suffix=" and we will come again.")
        generate(ignore_eos=True)
        generate(diffusion={"algorithm": generator.choice(("maskgit_plus", "topk_margin", "origin"))})
        generate(diffusion={"block_length": 4})
        generate(diffusion={"cfg_scale": 0.5})
        weights = [{"model": "sentiment"}, {"model": "concrete", "weight": 0.5}]
        generate(guidance={"method": "entrgi", "reward_models": weights}, best_of=2)
        pair = list(PROMPTS[:2])
        cases.append(Case(COMPLETIONS, {"prompt": pair, "max_tokens": 8, "seed": generator.randrange(99)}))
        answers = generator.sample(("It was lovely.", "It was dreadful.", "A chair.", "Fine, I suppose."), 3)
        cases.append(Case("/v1/score", {"queries": pair[0], "documents": answers}))
        cases.append(Case("/v1/rerank", {"query": pair[1], "documents": answers, "top_n": 2}))
        cases.append(Case("/tokenize", {"prompt": generator.choice(PROMPTS)}))
    mistakes: tuple[dict[str, Any], ...] = (
        {"prompt": "Hi", "temperature": -1},
        {"prompt": "Hi", "unknown": 1},
        {"prompt": []},
        {"prompt": "word " * 3000},
        {"prompt": "Hi", "guidance": {"method": "entrgi", "eta": 99}},
        {"messages": [{"role": "user", "content": "Hi"}]},
    )
    cases += [Case(COMPLETIONS, mistake, 400) for mistake in mistakes]
    cases.append(Case(CHAT, {"model": "none such", "messages": [{"role": "user", "content": "Hi"}]}, 404))
    cases.append(Case("/v1/score", {"queries": "a", "documents": []}, 400))
    return cases


@dataclass
class Soak:
    """What the clients share."""

    server: Server
    cases: list[Case]
    outcomes: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)
    latencies: list[float] = field(default_factory=list)
    samples: list[tuple[float, Usage]] = field(default_factory=list)
    _first: dict[int, Any] = field(default_factory=dict)

    async def user(self, number: int, until: float) -> None:
        """One client: a request after the other."""
        generator = random.Random(number)
        async with client(self.server, timeout=300) as http:
            while time.monotonic() < until:
                index = generator.randrange(len(self.cases))
                try:
                    await self.request(http, index, generator)
                except (httpx.HTTPError, ValueError, KeyError, AssertionError) as error:
                    self.outcomes["lost or wrong"] += 1
                    self.problems.append(f"case {index}: {type(error).__name__}: {error}"[:300])

    async def request(self, http: httpx.AsyncClient, index: int, generator: random.Random) -> None:
        """One request and everything that can be said about its answer."""
        case = self.cases[index]
        if case.fate == "cancelled":
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(generator.uniform(0.01, 0.5)):
                    await http.post(case.path, json=case.body)
            self.outcomes["cancelled"] += 1
            return
        name = uuid.uuid4().hex
        started = time.perf_counter()
        response = await http.post(case.path, json=case.body, headers={"X-Request-Id": name})
        self.latencies.append(time.perf_counter() - started)
        expect(response.headers["x-request-id"] == name, "the answer has another request's id")
        if case.fate == "hurried":
            expect(response.status_code in (200, 408), f"status {response.status_code}")
            self.outcomes[f"hurried: {response.status_code}"] += 1
            return
        expect(response.status_code == case.status, f"status {response.status_code}: {response.text[:200]}")
        self.outcomes[f"answered: {response.status_code}"] += 1
        if case.status == 200:
            self.compare(index, what_counts(case, response.text))
            self.note_id(case, response.text)

    def compare(self, index: int, answer: Any) -> None:
        """The same as the first time."""
        first = self._first.setdefault(index, answer)
        expect(same(first, answer), f"{json.dumps(self.cases[index].body)[:150]}: {first} became {answer}")

    def note_id(self, case: Case, text: str) -> None:
        """No two answers with one id."""
        event = next((line for line in text.splitlines() if line.startswith("data: ")), "") if case.stream else text
        identity = json.loads(event.removeprefix("data: ")).get("id")
        if identity is not None:
            expect(identity not in self.ids, f"id {identity} came twice")
            self.ids.add(identity)

    async def sample(self, until: float) -> None:
        """Look at the processes, and show how far we are."""
        started = time.monotonic()
        with tqdm(total=round(until - started), unit="s", mininterval=2) as bar:
            while (now := time.monotonic()) < until:
                usage = self.server.usage()
                self.samples.append((now - started, usage))
                bar.update(round(now - started) - bar.n)
                bar.set_postfix(
                    answers=self.outcomes.total(), front=f"{usage.front_mb:.0f}", worker=f"{usage.worker_mb:.0f}"
                )
                await asyncio.sleep(SAMPLE_SECONDS)


def expect(holds: bool, what: str) -> None:
    """Raises ValueError unless it holds."""
    if not holds:
        raise ValueError(what)


def what_counts(case: Case, text: str) -> Any:
    """The part of an answer that the request decides."""
    if case.stream:
        return joined(text)
    data = json.loads(text)
    if case.path in (COMPLETIONS, CHAT):
        return answer_of(data)
    return {key: value for key, value in data.items() if key not in ("id", "created")}


def same(first: Any, second: Any) -> bool:
    """Equality, up to the last digits of rewards, which depend on what else is in the batch."""
    if isinstance(first, float) and isinstance(second, float):
        return abs(first - second) <= 1e-4 * max(1.0, abs(first))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


async def run(server: Server, minutes: float, users: int, seed: int, samples_file: Path | None) -> int:
    """The soak and its verdict."""
    soak = Soak(server, catalogue(random.Random(seed)))
    until = time.monotonic() + 60 * minutes
    await asyncio.gather(soak.sample(until), *(soak.user(seed + number, until) for number in range(users)))
    idle = await seconds_until_idle(server)
    await asyncio.sleep(2)
    soak.samples.append((60 * minutes, server.usage()))
    if samples_file is not None:
        write_samples(samples_file, soak.samples)

    verdict = Verdict("soak")
    verdict.figures = {
        "minutes": minutes,
        "users": users,
        "outcomes": dict(sorted(soak.outcomes.items())),
        "cases": len(soak.cases),
        "latency_seconds": {f"p{q}": round(percentile(soak.latencies, q), 3) for q in (50, 99)},
        "idle_after_seconds": round(idle, 2),
        "problems": soak.problems[:5],
        "errors_logged": len(server.errors_logged()),
    }
    for name in ("front_mb", "worker_mb"):
        values = [getattr(usage, name) for _, usage in soak.samples]
        growth = growth_percent(values)
        verdict.figures[name] = {"tenths": tenths(values), "growth_percent": round(growth, 2)}
        verdict.promise(f"{name} flat within {GROWTH_PERCENT:g}% after the first quarter", growth <= GROWTH_PERCENT,
                        f"{growth:+.2f}%: {tenths(values)}")  # fmt: skip
    for name in ("front_fds", "worker_fds", "front_threads", "worker_threads"):
        values = [getattr(usage, name) for _, usage in soak.samples]
        # Descriptors of the HTTP process follow its connections; what is left at the end must be no more than at first.
        quarter = max(values[: max(1, len(values) // 4)])
        verdict.figures[name] = {"first_quarter_max": quarter, "max": max(values), "end": values[-1]}
        verdict.promise(f"{name}: no more at the end than in the first quarter", values[-1] <= quarter,
                        f"{values[-1]} <= {quarter}")  # fmt: skip
    verdict.promise(
        "no answer lost, doubled, mixed up or different", not soak.problems, soak.problems[:3] or soak.outcomes.total()
    )
    verdict.promise("gauges back to 0 within 10 s", idle <= 10, f"{idle:.1f} s")
    verdict.promise("no error logged", not server.errors_logged(), len(server.errors_logged()))
    return verdict.close()


def write_samples(path: Path, samples: list[tuple[float, Usage]]) -> None:
    """All samples as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["seconds", *asdict(samples[0][1])])
        writer.writeheader()
        writer.writerows({"seconds": round(seconds, 1), **asdict(usage)} for seconds, usage in samples)


def main() -> int:
    """Parse, serve, soak."""
    arguments = parser(__doc__)
    arguments.add_argument("--minutes", type=float, default=30.0)
    arguments.add_argument("--users", type=int, default=12, help="clients at once; default: %(default)s")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--samples", type=Path, metavar="FILE", help="write all samples as CSV")
    given = arguments.parse_args()
    with served() as server:
        return asyncio.run(run(server, given.minutes, given.users, given.seed, given.samples))


if __name__ == "__main__":
    sys.exit(main())

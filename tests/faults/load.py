"""What the fault programs send: seeded requests of every kind, from clients that know the right answers."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from server.methods import METHODS, gradient_methods
from tests.faults.harness import Server, Verdict, meanwhile, percentile
from tests.support.serving import chunks_of

COMPLETIONS, CHAT, SCORE = "/v1/completions", "/v1/chat/completions", "/v1/score"
PROMPTS = (
    "Write a short review of a hotel.",
    "What did you think of the phone?",
    "The book was",
    "Describe the restaurant that you tried, in a few words, and say what you would change about it if you could.",
)
# The models run in float64 where a seed must fix every token: the batch around a request cannot tip a near tie there.
EXACT = ("--dtype", "float64", "--device", "cpu")


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


def catalogue(rounds: int, seed: int, longest: int = 32, fates: Sequence[int] = (8, 1, 1)) -> list[Case]:
    """In each round a request for every guidance method, and twelve others: algorithms, several prompts, choices and
    reward models, infilling, scores, rankings; some streamed. `fates` weighs answered, cancelled and hurried ones."""
    generator = random.Random(seed)
    cases: list[Case] = []

    def generate(**fields: Any) -> None:
        length = max(4, generator.choice((1, 2, 4, 6, 8)) * longest // 8)
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
        fate = generator.choices(("answered", "cancelled", "hurried"), fates)[0]
        if fate == "hurried":
            body["timeout"] = generator.choice((0.01, 0.05, 0.2))
        if "suffix" in body or generator.random() < 0.5:
            cases.append(Case(COMPLETIONS, {"prompt": prompt, **body}, fate=fate))
        else:
            cases.append(Case(CHAT, {"messages": [{"role": "user", "content": prompt}], **body}, fate=fate))

    for _ in range(rounds):
        for method in METHODS:
            guidance: dict[str, Any] = {"method": method}
            if method in gradient_methods():
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
        cases.append(Case(SCORE, {"queries": pair[0], "documents": answers}))
        cases.append(Case("/v1/rerank", {"query": pair[1], "documents": answers, "top_n": 2}))
        cases.append(Case("/tokenize", {"prompt": generator.choice(PROMPTS)}))
    return cases


def chat(seed: int, **fields: Any) -> dict[str, Any]:
    """A small seeded chat request."""
    messages = [{"role": "user", "content": "Write a short review of a hotel."}]
    body = {"messages": messages, "max_tokens": 16, "seed": seed, "diffusion": {"steps": 8}, "return_token_ids": True}
    return {**body, **fields}


def client(server: Server) -> httpx.AsyncClient:
    """A client that never waits for a free connection of its own, and for an answer longer than any takes."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=50)
    return httpx.AsyncClient(base_url=server.url, timeout=900, limits=limits)


def joined(chunks: Sequence[dict[str, Any]]) -> dict[int, tuple[str, list[int] | None]]:
    """Text and tokens of each choice of an answer, which is one chunk, or of a stream, whose text is joined, so that a
    token that came twice makes it wrong. Raises ValueError when the stream ends with an error."""
    choices: dict[int, tuple[str, list[int] | None]] = {}
    for data in chunks:
        if "error" in data:
            raise ValueError(data["error"]["message"])
        for choice in data["choices"]:
            text, tokens = choices.get(choice["index"], ("", None))
            added = choice.get("text") or (choice.get("delta") or choice.get("message") or {}).get("content") or ""
            choices[choice["index"]] = (text + added, choice.get("token_ids") or tokens)
    return choices


def same(first: Any, second: Any) -> bool:
    """Equality, up to the last digits of rewards, which depend on what else is in the batch."""
    if isinstance(first, float) and isinstance(second, float):
        return abs(first - second) <= 1e-4 * max(1.0, abs(first))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


async def ask(http: httpx.AsyncClient, case: Case) -> tuple[str, Any, str]:
    """(`answer`, what the seed decides of it, the answer's id), or (an error's code or name, its message, no id)."""
    name = uuid.uuid4().hex
    try:
        response = await http.post(case.path, json=case.body, headers={"X-Request-Id": name})
    except httpx.HTTPError as error:
        return type(error).__name__, str(error), ""
    if response.headers.get("x-request-id") != name:
        return f"{response.status_code} that is not the answer", response.text, ""
    if response.status_code != 200:
        told = response.json()["error"]
        return f"{response.status_code} {told['code']}", told["message"], ""
    if case.path not in (COMPLETIONS, CHAT):
        data = response.json()
        return "answer", {key: value for key, value in data.items() if key not in ("id", "created")}, data.get("id", "")
    chunks: list[dict[str, Any]] = []
    try:
        chunks = chunks_of(response.text) if case.stream else [response.json()]
        return "answer", joined(chunks), chunks[0]["id"]
    except ValueError as error:
        return f"stream {chunks[-1]['error']['code'] if chunks else 'broken'}", str(error), ""


@dataclass(frozen=True)
class Sent:
    """One request that was sent: when, and when and with what outcome it came back (seconds of time.monotonic())."""

    began: float
    ended: float
    outcome: str


@dataclass
class Load:
    """Clients that send the catalogue again and again, and compare. An outcome is `right` (what came the first time, or
    the status that a mistake must get), `wrong`, `cancelled`, `hurried`, an error's status and code (`stream` and code,
    when the answer had begun), or the name of a broken connection's exception. `sent` counts the requests; `requests`
    are those that came back."""

    server: Server
    cases: Sequence[Case]
    clients: int = 1
    seed: int = 0
    sent: int = 0
    requests: list[Sent] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    _right: dict[int, Any] = field(default_factory=dict)
    _ids: set[str] = field(default_factory=set)

    @property
    def in_flight(self) -> int:
        """Requests that have not come back."""
        return self.sent - len(self.requests)

    @property
    def outcomes(self) -> Counter[str]:
        """How often each outcome came."""
        return Counter(request.outcome for request in self.requests)

    @property
    def latencies(self) -> list[float]:
        """Seconds that right answers took."""
        return [request.ended - request.began for request in self.requests if request.outcome == "right"]

    async def learn(self) -> None:
        """Get the right answers from an undisturbed server, as many at a time as there will be clients."""
        indices = iter(range(len(self.cases)))

        async def some() -> None:
            async with client(self.server) as http:
                for index in indices:
                    outcome = await self._outcome(http, index, random.Random())
                    if outcome != "right":
                        raise RuntimeError(f"an undisturbed request failed: {outcome} {self.cases[index]}")

        await asyncio.gather(*(some() for _ in range(self.clients)))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Clients at work until the block is left; then every client gets its last answer."""
        over = asyncio.Event()
        clients = [asyncio.create_task(self._client(number, over)) for number in range(self.clients)]
        try:
            yield
        finally:
            over.set()
            await asyncio.gather(*clients)

    async def _client(self, number: int, over: asyncio.Event) -> None:
        generator = random.Random(f"{self.seed}/{number}")
        async with client(self.server) as http:
            while not over.is_set():
                index = generator.randrange(len(self.cases))
                self.sent += 1
                began = time.monotonic()
                outcome = await self._outcome(http, index, generator)
                self.requests.append(Sent(began, time.monotonic(), outcome))
                if outcome not in ("right", "wrong", "cancelled", "hurried"):
                    await asyncio.sleep(0.2)

    async def _outcome(self, http: httpx.AsyncClient, index: int, generator: random.Random) -> str:
        case = self.cases[index]
        if case.fate == "cancelled":
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(generator.uniform(0.01, 0.5)):
                    await ask(http, case)
            return "cancelled"
        outcome, answer, identity = await ask(http, case)
        if case.fate == "hurried" and (outcome == "answer" or outcome.endswith(" deadline_exceeded")):
            return "hurried"
        if outcome != "answer":
            return "right" if outcome.startswith(f"{case.status} ") else outcome
        right = self._right.setdefault(index, answer)
        if same(right, answer) and identity not in self._ids:
            self._ids |= {identity} - {""}
            return "right"
        self.wrong.append(f"case {index}, id {identity}: {right} became {answer}"[:300])
        return "wrong"


@asynccontextmanager
async def bystander(server: Server, verdict: Verdict, what: str) -> AsyncIterator[list[float]]:
    """A client that does nothing wrong, in the block in which others misbehave: a known request, one after the other,
    and `/health` ten times a second. Promises that each answer was right (a refusal with 429 is one); gives the
    seconds that `/health` took."""
    load = Load(server, [Case(CHAT, chat(7))])
    health: list[float] = []

    async def probe() -> None:
        async with client(server) as http:
            while True:
                started = time.perf_counter()
                (await http.get("/health")).raise_for_status()
                health.append(time.perf_counter() - started)
                await asyncio.sleep(0.1)

    await load.learn()
    async with meanwhile(probe()), load.running():
        yield health
    refused = {name for name in load.outcomes if name.startswith("429 ")}
    seen = f"{dict(load.outcomes)}, p99 {percentile(load.latencies, 99):.2f} s, /health {percentile(health, 99):.3f} s"
    kept = bool(health) and load.outcomes["right"] > 0 and set(load.outcomes) <= {"right", *refused}
    verdict.promise(f"{what}: others got right answers", kept, seen)

"""What the fault programs send: seeded requests of every kind, from clients that know the right answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.faults.harness import Server, answer_of, client, joined
from tests.support.serving import chunks_of

COMPLETIONS, CHAT, SCORE = "/v1/completions", "/v1/chat/completions", "/v1/score"
PROMPTS = (
    "Write a short review of a hotel.",
    "What did you think of the phone?",
    "The book was",
    "Describe the restaurant that you tried, in a few words, and say what you would change about it if you could.",
)
METHODS = ("none", "bon", "expectation", "aps", "entrgi")


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
    """Seventeen different requests a round: every guidance method and algorithm, several prompts, choices and reward
    models, infilling, scores, rankings; some streamed. `fates` weighs answered, cancelled and hurried ones."""
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
        cases.append(Case(SCORE, {"queries": pair[0], "documents": answers}))
        cases.append(Case("/v1/rerank", {"query": pair[1], "documents": answers, "top_n": 2}))
        cases.append(Case("/tokenize", {"prompt": generator.choice(PROMPTS)}))
    return cases


def what_counts(case: Case, text: str) -> Any:
    """The part of an answer that the request decides. A stream's text is compared whole, so that a token that came
    twice makes it wrong; ValueError when a stream has no end, or ends with an error."""
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
    clients: int
    seed: int = 0
    sent: int = 0
    in_flight: int = 0
    requests: list[Sent] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    stopped: bool = False
    _right: dict[int, Any] = field(default_factory=dict)
    _ids: set[str] = field(default_factory=set)

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
        gate = asyncio.Semaphore(self.clients)
        async with client(self.server, timeout=900) as http:

            async def one(index: int) -> None:
                async with gate:
                    outcome = await self._outcome(http, index, random.Random())
                if outcome != "right":
                    raise RuntimeError(f"an undisturbed request failed: {outcome} {self.cases[index]}")

            await asyncio.gather(*map(one, range(len(self.cases))))

    async def run(self) -> None:
        """Until `stopped` is set; then returns when every client has its last answer."""
        self.stopped = False
        await asyncio.gather(*(self._client(number) for number in range(self.clients)))

    async def _client(self, number: int) -> None:
        generator = random.Random(f"{self.seed}/{number}")
        async with client(self.server, timeout=900) as http:
            while not self.stopped:
                index = generator.randrange(len(self.cases))
                self.sent += 1
                self.in_flight += 1
                began = time.monotonic()
                outcome = await self._outcome(http, index, generator)
                self.in_flight -= 1
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
        if outcome == "answer":
            right = self._right.setdefault(index, answer)
            if same(right, answer) and identity not in self._ids:
                self._ids |= {identity} - {""}
                return "right"
            self.wrong.append(f"case {index}, id {identity}: {right} became {answer}"[:300])
            return "wrong"
        return "right" if outcome.startswith(f"{case.status} ") else outcome


async def ask(http: httpx.AsyncClient, case: Case) -> tuple[str, Any, str]:
    """(`answer`, what the seed decides of it, the answer's id), or (an error's code or name, its message, no id)."""
    name = uuid.uuid4().hex
    try:
        response = await http.post(case.path, json=case.body, headers={"X-Request-Id": name})
    except httpx.HTTPError as error:
        return type(error).__name__, str(error), ""
    if response.headers["x-request-id"] != name:
        return "another request's answer", response.text, ""
    if response.status_code != 200:
        told = response.json()["error"]
        return f"{response.status_code} {told['code']}", told["message"], ""
    try:
        whole = chunks_of(response.text)[0] if case.stream else response.json()
        return "answer", what_counts(case, response.text), whole.get("id", "")
    except ValueError as error:
        return f"stream {_code_of(response.text)}", str(error), ""


def _code_of(text: str) -> str:
    """The code of the error that a stream ends with, or `broken`."""
    with contextlib.suppress(ValueError, LookupError):
        return str(chunks_of(text)[-1]["error"]["code"])
    return "broken"

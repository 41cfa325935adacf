"""The load under which the kill programs kill: seeded requests of every kind, whose right answers are known."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.faults.harness import Server, answer_of, client, joined

COMPLETIONS, CHAT, SCORE = "/v1/completions", "/v1/chat/completions", "/v1/score"
PROMPTS = (
    "Write a short review of a hotel.",
    "What did you think of the phone?",
    "The book was",
    "Describe the restaurant that you tried, in a few words, and say what you would change about it.",
)
METHODS = ("none", "bon", "expectation", "aps", "entrgi")


@dataclass(frozen=True)
class Case:
    """One request, and how to send it."""

    path: str
    body: dict[str, Any]

    @property
    def stream(self) -> bool:
        """Whether the answer comes as events."""
        return bool(self.body.get("stream"))


def catalogue(count: int, seed: int, longest: int = 32) -> list[Case]:
    """`count` different requests: all methods, streamed and not, chat and completions, several trajectories, scores."""
    generator = random.Random(seed)
    cases = []
    for index in range(count):
        prompt = generator.choice(PROMPTS)
        if index % 12 == 11:
            documents = [f"It was {word}." for word in generator.sample(("good", "bad", "slow", "clean", "odd"), 3)]
            cases.append(Case(SCORE, {"queries": prompt, "documents": documents}))
            continue
        method = METHODS[index % len(METHODS)]
        length = generator.choice((longest // 4, longest // 2, longest))
        body: dict[str, Any] = {
            "seed": index,
            "max_tokens": length,
            "diffusion": {"steps": length},
            "return_token_ids": True,
            "stream": index % 2 == 1,
        }
        if method != "none":
            body["guidance"] = {"method": method}
            body["best_of"] = generator.choice((1, 2, 3))
        if index % 3:
            cases.append(Case(CHAT, {**body, "messages": [{"role": "user", "content": prompt}]}))
        else:
            cases.append(Case(COMPLETIONS, {**body, "prompt": prompt}))
    return cases


@dataclass(frozen=True)
class Sent:
    """One request that was sent: when, and when and with what outcome it came back (seconds of time.monotonic())."""

    began: float
    ended: float
    outcome: str


@dataclass
class Load:
    """Clients that send the catalogue again and again, and compare. An outcome is `right`, `wrong`, an error's status
    and code (`stream` and code, when the answer had begun), or the name of a broken connection's exception. `sent`
    counts the requests; `requests` are those that came back."""

    server: Server
    cases: Sequence[Case]
    clients: int
    seed: int = 0
    sent: int = 0
    in_flight: int = 0
    requests: list[Sent] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    _right: list[Any] = field(default_factory=list)
    _stopped: bool = False

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

            async def one(case: Case) -> Any:
                async with gate:
                    outcome, answer = await ask(http, case)
                if outcome != "answer":
                    raise RuntimeError(f"an undisturbed request failed: {outcome} {answer}")
                return answer

            self._right = await asyncio.gather(*map(one, self.cases))

    async def alone(self) -> list[float]:
        """Seconds that each case takes with nothing beside it, after `learn`. Raises RuntimeError when it then gets
        another answer."""
        latencies = []
        async with client(self.server, timeout=900) as http:
            for case, right in zip(self.cases, self._right, strict=True):
                began = time.monotonic()
                outcome, answer = await ask(http, case)
                latencies.append(time.monotonic() - began)
                if (outcome, answer) != ("answer", right):
                    raise RuntimeError(f"alone, {case} gets another answer: {outcome} {answer} instead of {right}")
        return latencies

    async def run(self) -> None:
        """Until `stop`; then returns when every client has its last answer."""
        await asyncio.gather(*(self._client(number) for number in range(self.clients)))

    def stop(self) -> None:
        """No new requests."""
        self._stopped = True

    def resume(self) -> None:
        """`run` may be called again."""
        self._stopped = False

    async def _client(self, number: int) -> None:
        generator = random.Random(f"{self.seed}/{number}")
        async with client(self.server, timeout=900) as http:
            while not self._stopped:
                index = generator.randrange(len(self.cases))
                self.sent += 1
                self.in_flight += 1
                began = time.monotonic()
                outcome, answer = await ask(http, self.cases[index])
                self.in_flight -= 1
                if outcome == "answer":
                    outcome = "right" if answer == self._right[index] else "wrong"
                    if outcome == "wrong":
                        self.wrong.append(f"case {index}: {answer} instead of {self._right[index]}")
                self.requests.append(Sent(began, time.monotonic(), outcome))
                if outcome not in ("right", "wrong"):
                    await asyncio.sleep(0.2)


async def ask(http: httpx.AsyncClient, case: Case) -> tuple[str, Any]:
    """(`answer`, what the seed decides of it), or (an error's code or name, its message). Never anything else, and
    never twice: a stream's text is compared whole, so a token that came twice makes it wrong."""
    try:
        response = await http.post(case.path, json=case.body)
    except httpx.HTTPError as error:
        return type(error).__name__, str(error)
    if response.status_code != 200:
        error = response.json()["error"]
        return f"{response.status_code} {error['code']}", error["message"]
    if case.path == SCORE:
        return "answer", [score["score"] for score in response.json()["data"]]
    if not case.stream:
        return "answer", answer_of(response.json())
    try:
        return "answer", joined(response.text)
    except ValueError as error:
        return f"stream {_code_of(response.text)}", str(error)


def _code_of(chunks: str) -> str:
    """The code of the error that a stream ends with, or `broken`."""
    for event in chunks.split("\n\n"):
        data = event.removeprefix("data: ")
        if data.startswith('{"error"'):
            return str(json.loads(data)["error"]["code"])
    return "broken"

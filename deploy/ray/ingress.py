"""What stands before replicas: an application without a model, which has the API keys, the limits, the refusals and the
one retry. It takes as many prompts as the replicas that are there have places (`max_queue` each) and refuses the rest,
so that nothing waits here and deadlines count where the work is. Who runs the replicas is not known here (`Fleet`).

A request whose replica dies goes to another one, once, if nothing of an answer has been sent: it has a seed, which is
drawn here where the client sent none, so the answer is the same. A stream that had begun ends with an error in it. A
request that a replica has no room for is asked once more, too.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from contextlib import aclosing, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Protocol, TypeVar

from prometheus_client import generate_latest
from prometheus_client.core import Metric
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.types import Message, Receive, Scope, Send

from server.api import errors, rewards
from server.api.app import guard
from server.api.body import read, unless_disconnected
from server.api.convert import SEED_BITS, Asked, trajectories
from server.api.fields import ChatCompletionRequest, CompletionRequest
from server.api.metrics import CONTENT_TYPE, Metrics
from server.api.middleware import local_path
from server.api.responses import ResponsesRequest, failure
from server.api.shares import Shares
from server.api.stream import Chunks, encode
from server.errors import ClientGone, Draining, NotReady, QueueFull, Unavailable
from server.front.admission import Throughput
from server.log import note
from server.settings import Settings

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

GENERATES: dict[str, type[Asked]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/responses": ResponsesRequest,
}
ATTEMPTS = 2
NO_ROOM = frozenset({QueueFull.code, NotReady.code, Draining.code})
"""What a replica says that has computed nothing, while another may have room."""
SCORES = {route.path for route in rewards.router.routes if isinstance(route, Route) and "tokenize" not in route.path}
SIGN = re.compile(r"\s*([{,:])\s*")  # what stands before each key and each value of a JSON object
KEPT_HERE = frozenset({b"authorization", b"content-length", b"transfer-encoding", b"x-request-id"})
PASSED_ON = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "client", "server")


class ReplicaLost(Exception):
    """The replica that was asked is gone."""


class Fleet(Protocol):
    """The replicas. `running` is how many can take requests."""

    running: int

    def ask(self, scope: Scope, body: bytes) -> AsyncGenerator[Message]:
        """What one of them answers: first a message `replica` with its `name`, then ASGI's. Closing it early cancels
        the work. Raises ReplicaLost, and Unavailable where there will be none."""

    async def metrics(self) -> Mapping[str, Iterable[Metric]]:
        """The metrics of each, by its name."""


class Ingress:
    """The application (`app`) before a fleet."""

    served = None  # bounds that follow from the models are checked where these are

    def __init__(self, fleet: Fleet, settings: Settings) -> None:
        self.metrics = Metrics()
        self.app = Starlette(
            routes=[
                Route("/health", self._alive),
                Route("/ping", self._alive),
                Route("/ready", self._ready),
                Route("/metrics", self._metrics),
                Mount("/", app=self._pass_on),
            ]
        )
        self.app.state.frontend = self  # of which the handlers of errors want the metrics
        errors.install(self.app)
        guard(self.app, settings, self.metrics)
        self._fleet = fleet
        self._each = settings.max_queue
        self._taken = 0
        self._throughput = Throughput(time.monotonic())
        self._shares = Shares(settings, list)

    async def aside(self, work: Callable[[], Result]) -> Result:
        """Do long work in a thread."""
        return await asyncio.to_thread(work)

    async def _alive(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _ready(self, _: Request) -> Response:
        self._check_room(0)
        return JSONResponse({"status": "ready"})

    async def _metrics(self, _: Request) -> Response:
        told = {**await self._fleet.metrics(), "ingress": self.metrics.registry.collect()}
        return Response(generate_latest(SimpleNamespace(collect=lambda: merged(told))), media_type=CONTENT_TYPE)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Any other request, as a replica answers it."""
        prompts, rows, body = await self._read(Request(scope, receive))
        try:
            with self._shares.taken(rows) if prompts else nullcontext(), self._places(prompts) as head:
                await unless_disconnected(receive, self._answer(scope, body, send, head))
        except ClientGone as gone:
            note(error_code=gone.code, error_status=gone.status)

    async def _read(self, request: Request) -> tuple[int, int, bytes]:
        """How many prompts (or batches of scores) a request has, how many trajectories, and its body, with a seed."""
        path = local_path(request.scope)
        if request.method != "POST" or path not in GENERATES:
            try:
                return int(request.method == "POST" and path in SCORES), 0, await request.body()
            except ClientDisconnect:
                raise ClientGone("the client closed the connection") from None
        asked = await read(request, self, GENERATES[path])
        body = await request.body()
        if asked.seed is None:
            body = await self.aside(lambda: _seeded(body))
        prompts = len(asked.prompt) if isinstance(asked, CompletionRequest) else 1
        return prompts, prompts * trajectories(asked), body

    def _check_room(self, prompts: int) -> None:
        """Raises NotReady and QueueFull. A request that no replica ever takes is let through, to be told so."""
        places = self._fleet.running * self._each
        if not places:
            raise NotReady("no replica is ready to take requests")
        if prompts and self._taken + min(prompts, self._each) > places:
            wait = self._throughput.retry_after_seconds(self._taken, time.monotonic(), prompts)
            raise QueueFull(f"{self._taken} prompts are in flight; the replicas take {places}", retry_after=wait)

    @contextmanager
    def _places(self, prompts: int) -> Iterator[Message]:
        """So many prompts are in flight meanwhile. What it gives is for the header of their answer: work that a replica
        refuses says nothing of how fast work leaves."""
        self._check_room(prompts)
        self._count(prompts)
        head: Message = {}
        try:
            yield head
        finally:
            for _ in range(prompts if head.get("status", 200) < 400 else 0):
                self._throughput.finished(time.monotonic())
            self._count(-prompts)

    def _count(self, prompts: int) -> None:
        self._taken += prompts
        self._throughput.taken(self._taken, self._fleet.running * self._each, time.monotonic())

    async def _answer(self, scope: Scope, body: bytes, send: Send, head: Message) -> None:
        """Send on what a replica answers, its header (which `head` becomes) with the first of the body, so that nothing
        is sent by one that dies before it or has no room."""
        told = {name: scope[name] for name in PASSED_ON if name in scope}
        headers = [(name, value) for name, value in scope["headers"] if name not in KEPT_HERE]
        told["headers"] = [*headers, (b"x-request-id", scope["state"]["request_id"].encode())]
        begun = more = False
        events = 0
        for left in reversed(range(ATTEMPTS)):
            try:
                async with aclosing(self._fleet.ask(told, body)) as messages:
                    async for message in messages:
                        match message:
                            case {"type": "replica", "name": name}:
                                note(replica=name)
                            case {"type": "http.response.start"}:
                                head.update(message)
                            case {"body": part} if left and not begun and _has_no_room(head["status"], part):
                                break
                            case {"body": part}:
                                if not begun:
                                    begun = True
                                    await send(head)
                                await send(message)
                                more = message.get("more_body", False)
                                events += part.startswith(b"event:")
                    else:
                        return
            except ReplicaLost as lost:
                logger.warning("a replica was lost: %s", lost)
                note(replica=None)  # what it had counted is lost, too
            if more:
                await self._break_off(local_path(scope), events, send)
            if begun:
                return
        head["status"] = Unavailable.status
        raise Unavailable("the replica that was asked last was lost, and no further one is asked")

    async def _break_off(self, path: str, events: int, send: Send) -> None:
        """The end of a stream that cannot go on; only streams come in parts."""
        error = Unavailable("the replica was lost, and the text cannot be continued")
        note(error_code=error.code, error_status=error.status)
        self.metrics.refused(error)
        if GENERATES[path] is ResponsesRequest:
            last = encode({**failure(error), "type": "error", "sequence_number": events})
        else:
            last = encode(errors.envelope(error)) + Chunks.last
        await send({"type": "http.response.body", "body": last})


def _has_no_room(status: int, body: bytes) -> bool:
    return status in (429, 503) and bool(body) and json.loads(body)["error"]["code"] in NO_ROOM


def _seeded(body: bytes) -> bytes:
    """A request's body, a JSON object that is known to be right and to have no seed, or null for one, with a seed.
    Everything else stays as the client wrote it: written anew it could be longer than a replica takes."""
    text, seed = body.decode(), secrets.randbits(SEED_BITS)
    decode, end, last = json.JSONDecoder().raw_decode, 0, None
    while sign := SIGN.match(text, end):
        value, end = decode(text, sign.end())
        if sign[1] == ":" and last == "seed":
            return f"{text[: sign.end()]}{seed}{text[end:]}".encode()
        last = value
    return f'{text[:end]},"seed":{seed}}}'.encode()


def merged(told: Mapping[str, Iterable[Metric]]) -> Iterator[Metric]:
    """The metrics of all, in whose samples a label `replica` says whose they are."""
    families: dict[str, Metric] = {}
    for replica, metrics in told.items():
        for metric in metrics:
            family = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
            family.samples += [each._replace(labels={**each.labels, "replica": replica}) for each in metric.samples]
    yield from families.values()

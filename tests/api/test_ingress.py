"""The ingress before replicas, without Ray: applications on scripted engines stand for replicas, and some die."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from typing import Any

import pytest
from fastapi import FastAPI
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import Message, Scope

from deploy.ray.ingress import Fleet, Ingress, ReplicaLost
from deploy.ray.replica import respond
from deploy.ray.settings import divided
from server.settings import SettingsError, load
from tests.api.scripted_engine import KEYS, ScriptedEngine, at_once, bearer, check_envelope, make, never, open_client
from tests.front.scripted import until
from tests.support.serving import chunks_of

COMPLETIONS = "/v1/completions"
ASKED = {"prompt": "Hi", "max_tokens": 2}


class Replicas(Fleet):
    """One application a request, in order, the last one for all that follow. Of the first `deaths`, each dies after so
    many messages."""

    def __init__(self, *engines: ScriptedEngine, deaths: tuple[int, ...] = ()) -> None:
        self.apps: list[FastAPI] = [make(engine) for engine in engines]
        self.running = len(engines)
        self.scopes: list[Scope] = []
        self._deaths = list(deaths)

    async def ask(self, scope: Scope, body: bytes) -> AsyncGenerator[Message]:
        number = min(len(self.scopes), len(self.apps) - 1)
        self.scopes.append(scope)
        left = self._deaths.pop(0) if self._deaths else None
        yield {"type": "replica", "name": str(number)}
        async with aclosing(respond(self.apps[number], dict(scope), body)) as messages:
            async for message in messages:
                if left == 0:
                    raise ReplicaLost(f"replica {number}")
                left = None if left is None else left - 1
                yield message

    async def metrics(self) -> Mapping[str, Iterable[Metric]]:
        return {str(n): app.state.frontend.metrics.registry.collect() for n, app in enumerate(self.apps)}


def ingress(fleet: Fleet, **settings: Any) -> Any:
    return Ingress(fleet, divided(load(settings))[0]).app


async def test_an_answer_is_the_replicas_own() -> None:
    engine = ScriptedEngine(at_once)
    async with open_client(ingress(Replicas(engine))) as client, open_client(make(engine)) as direct:
        for path, body in ((COMPLETIONS, {**ASKED, "seed": 3}), ("/v1/chat/completions", {"messages": 1}), ("/no", {})):
            through = await client.post(path, json=body, headers={"X-Request-Id": "mine"})
            itself = await direct.post(path, json=body, headers={"X-Request-Id": "mine"})
            assert through.status_code == itself.status_code
            assert through.headers == itself.headers
            assert {**through.json(), "id": "", "created": 0} == {**itself.json(), "id": "", "created": 0}
        assert (await client.get("/v1/models")).json()["data"][0]["id"] == "dlm"
        assert (await client.get("/ready")).json() == {"status": "ready"}


@pytest.mark.parametrize("deaths", [(0,), (1,)], ids=["before the header", "before the body"])
@pytest.mark.parametrize("stream", [False, True])
async def test_what_has_not_begun_is_asked_again_with_the_seed_that_it_was_given(
    deaths: tuple[int, ...], stream: bool
) -> None:
    first, second = ScriptedEngine(at_once), ScriptedEngine(at_once)
    async with open_client(ingress(Replicas(first, second, deaths=deaths))) as client:
        response = await client.post(COMPLETIONS, json={**ASKED, "stream": stream})
    assert response.status_code == 200, response.text
    (lost,), (answered,) = first.jobs, second.jobs
    assert lost.sampling == answered.sampling
    answer = chunks_of(response.text)[-1] if stream else response.json()
    assert answer["guidance"]["seed"] == lost.sampling.seed


async def test_two_deaths_are_a_503() -> None:
    engine = ScriptedEngine(at_once)
    async with open_client(ingress(Replicas(engine, deaths=(0, 1)))) as client:
        response = await client.post(COMPLETIONS, json=ASKED)
        assert check_envelope(response, 503)["code"] == "unavailable"
        assert response.headers["retry-after"] == "1"
        assert (await client.post(COMPLETIONS, json=ASKED)).status_code == 200
    assert len(engine.jobs) == 3


async def test_a_stream_that_has_begun_ends_with_an_error() -> None:
    fleet = Replicas(ScriptedEngine(at_once), deaths=(2, 3))
    async with open_client(ingress(fleet)) as client:
        text, broken = chunks_of((await client.post(COMPLETIONS, json={**ASKED, "stream": True})).text)
        assert text["choices"][0]["text"]
        assert broken["error"]["code"] == "unavailable"
        told = (await client.post("/v1/responses", json={"input": "Hi", "stream": True})).text
        *events, last = [json.loads(event.partition("data: ")[2]) for event in told.strip().split("\n\n")]
        assert [event["sequence_number"] for event in (*events, last)] == [0, 1, 2]
        assert (last["type"], last["code"], last["error"]["code"]) == ("error", "unavailable", "unavailable")
    assert len(fleet.scopes) == 2


async def test_keys_and_their_limits_are_the_ingress_own() -> None:
    fleet = Replicas(ScriptedEngine(never))
    async with open_client(ingress(fleet, api_key=KEYS, max_key_requests=1, max_key_trajectories=4)) as client:
        check_envelope(await client.post(COMPLETIONS, json=ASKED), 401)
        assert fleet.scopes == []
        guided = {**ASKED, "guidance": {"method": "entrgi"}, "best_of": 5}
        assert check_envelope(await client.post(COMPLETIONS, json=guided, headers=bearer(KEYS[0])), 400)
        waiting = asyncio.create_task(client.post(COMPLETIONS, json=ASKED, headers=bearer(KEYS[0])))
        await until(lambda: bool(fleet.scopes))
        refused = await client.post(COMPLETIONS, json=ASKED, headers=bearer(KEYS[0]))
        assert check_envelope(refused, 429)["code"] == "key_limit"
        assert int(refused.headers["retry-after"]) >= 1
        assert b"authorization" not in dict(fleet.scopes[0]["headers"])
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


async def test_replicas_take_what_they_have_places_for() -> None:
    fleet = Replicas(ScriptedEngine(never))
    async with open_client(ingress(fleet, max_queue=2)) as client:
        waiting = asyncio.create_task(client.post(COMPLETIONS, json={**ASKED, "prompt": ["a", "b"]}))
        await until(lambda: bool(fleet.scopes))
        refused = await client.post(COMPLETIONS, json=ASKED)
        assert check_envelope(refused, 429)["code"] == "queue_full"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        fleet.running = 0
        assert check_envelope(await client.post(COMPLETIONS, json=ASKED), 503)["code"] == "not_ready"
        assert check_envelope(await client.get("/ready"), 503)["code"] == "not_ready"
        assert (await client.get("/health")).status_code == (await client.head("/ping")).status_code == 200
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


async def test_a_client_that_goes_takes_its_work_along() -> None:
    engine = ScriptedEngine(never)
    fleet = Replicas(engine)
    app, gone = ingress(fleet, max_queue=1), asyncio.Event()
    body = json.dumps(ASKED).encode()
    parts = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Message:
        for part in parts:
            return part
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(_: Message) -> None:
        raise AssertionError("nobody is there to read it")

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "query_string": b"", "headers": headers}
    asked = asyncio.create_task(app(scope, receive, send))
    await until(lambda: bool(engine.jobs))
    gone.set()
    await asked
    assert engine.cancelled == [job.id for job in engine.jobs]
    async with open_client(app) as client:
        assert (await client.get("/ready")).status_code == 200  # the place is free


async def test_metrics_of_all_are_in_one_text_and_nothing_is_counted_twice() -> None:
    async with open_client(ingress(Replicas(ScriptedEngine(at_once), ScriptedEngine(at_once)), api_key=KEYS)) as client:
        for headers in (bearer(KEYS[0]), bearer(KEYS[1]), {}):
            await client.post(COMPLETIONS, json=ASKED, headers=headers)
        text = (await client.get("/metrics", headers=bearer(KEYS[0]))).text
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    (requests,) = (family for family in families if family.name == "entrgi:http_requests")
    counted = {tuple(map(each.labels.get, ("replica", "route", "status"))) for each in requests.samples if each.value}
    assert counted == {("0", COMPLETIONS, "200"), ("1", COMPLETIONS, "200"), ("ingress", "other", "401")}


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"host": "0.0.0.0"}, "http_options"), ({"batch_dir": "."}, "clients batch"), ({"max_connections": 9}, "proxy")],
)
def test_a_setting_without_effect_is_refused(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(SettingsError, match=f"{next(iter(settings))}: .*{word}"):
        divided(load(settings))


def test_keys_leave_as_hashes_and_replicas_get_none() -> None:
    door, model = divided(load({"api_key": KEYS, "max_key_requests": 3, "cors_origins": ["http://a"]}))
    assert all(key.startswith("sha256:") for key in door.api_key)
    assert (model.api_key, model.max_key_requests, model.cors_origins) == ((), None, ())
    assert (door.max_key_requests, door.cors_origins, model.threads) == (3, ("http://a",), 1)

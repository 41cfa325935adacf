"""The ingress before replicas, without Ray: applications on scripted engines stand for replicas, and some die."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import Message, Scope

from deploy.ray.ingress import Fleet, Ingress, ReplicaLost
from deploy.ray.replica import respond
from deploy.ray.settings import divided, forget_keys, read, resources
from server.api.app import create_app
from server.errors import Draining, InvalidRequest, NotReady, QueueFull, RequestError, ScorerUnavailable
from server.front.admission import UNKNOWN_RATE_SECONDS
from server.settings import SettingsError, load
from tests.api.scripted_engine import KEYS, ScriptedEngine, at_once, bearer, check_envelope, make, never, open_client
from tests.front.scripted import until
from tests.support.serving import chunks_of

COMPLETIONS = "/v1/completions"
JSON = {"content-type": "application/json"}
ASKED = {"prompt": "Hi", "max_tokens": 2}


class Replicas(Fleet):
    """One application a request, in order, the last one for all that follow. Of the first `deaths`, each dies after so
    many messages."""

    def __init__(self, *engines: ScriptedEngine, deaths: tuple[int, ...] = (), **settings: Any) -> None:
        self.apps: list[FastAPI] = [create_app(engine, divided(load(settings))[1]) for engine in engines]
        self.running = len(engines)
        self.scopes: list[Scope] = []
        self.bodies: list[bytes] = []
        self._deaths = list(deaths)

    async def ask(self, scope: Scope, body: bytes) -> AsyncGenerator[Message]:
        number = min(len(self.scopes), len(self.apps) - 1)
        self.scopes.append(scope)
        self.bodies.append(body)
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


@pytest.mark.parametrize(
    ("sent", "passed_on"),
    [
        ('{"prompt": "Привет 😀", "max_tokens": 2} \n', '{"prompt": "Привет 😀", "max_tokens": 2,"seed":SEED}'),
        ('{"seed" : null, "prompt": "Hi"}', '{"seed" : SEED, "prompt": "Hi"}'),
        ('{"prompt": "seed", "s\\u0065ed":null}', '{"prompt": "seed", "s\\u0065ed":SEED}'),
        (
            ' {"metadata": {"x": 1e999, "seed": null}, "prompt": "\\"seed\\": null"}',
            ' {"metadata": {"x": 1e999, "seed": null}, "prompt": "\\"seed\\": null","seed":SEED}',
        ),
    ],
)
async def test_a_seed_is_all_that_is_added_to_a_body(sent: str, passed_on: str) -> None:
    engine = ScriptedEngine(at_once)
    fleet = Replicas(engine)
    async with open_client(ingress(fleet)) as client:
        response = await client.post(COMPLETIONS, content=sent.encode(), headers=JSON)
    assert response.status_code == 200, response.text
    assert fleet.bodies == [passed_on.replace("SEED", str(engine.jobs[0].sampling.seed)).encode()]


async def test_a_body_as_large_as_the_ingress_takes_is_not_too_large_for_a_replica() -> None:
    fleet = Replicas(ScriptedEngine(at_once), max_body_bytes=1024)
    body = json.dumps({**ASKED, "metadata": {"x": "😀" * 200}}, ensure_ascii=False).encode()
    full = body[:-3] + b"x" * (1024 - len(body)) + body[-3:]
    async with open_client(ingress(fleet, max_body_bytes=1024)) as client:
        assert (await client.post(COMPLETIONS, content=full, headers=JSON)).status_code == 200
        check_envelope(await client.post(COMPLETIONS, content=full + b" ", headers=JSON), 413)
    assert len(full) == 1024 < len(*fleet.bodies)


@pytest.mark.parametrize(
    ("refusal", "asked"),
    [
        (QueueFull("no room", retry_after=9), 2),
        (NotReady("loading"), 2),
        (Draining("going"), 2),
        (ScorerUnavailable("the same for all"), 1),
        (InvalidRequest("the same for all"), 1),
    ],
    ids=lambda value: getattr(value, "code", None),
)
async def test_what_one_replica_has_no_room_for_goes_to_another(refusal: RequestError, asked: int) -> None:
    refusing, other = ScriptedEngine(at_once, refusal), ScriptedEngine(at_once)
    fleet = Replicas(refusing, other)
    async with open_client(ingress(fleet)) as client:
        response = await client.post(COMPLETIONS, json=ASKED)
        assert response.status_code == (200 if asked == 2 else refusal.status), response.text
        assert len(fleet.bodies) == asked
        assert len(set(fleet.bodies)) == 1
        other.refuse = refusal
        last = check_envelope(await client.post(COMPLETIONS, json=ASKED), refusal.status)
        assert last["code"] == refusal.code


async def test_refusals_say_nothing_of_how_fast_work_leaves() -> None:
    full = ScriptedEngine(at_once, QueueFull("no room"))
    fleet = Replicas(ScriptedEngine(never), full)
    async with open_client(ingress(fleet, max_queue=2)) as client:
        waiting = asyncio.create_task(client.post(COMPLETIONS, json={**ASKED, "prompt": ["a", "b"]}))
        await until(lambda: bool(fleet.scopes))
        for _ in range(3):
            check_envelope(await client.post(COMPLETIONS, json=ASKED), 429)
        fleet.running = 1
        refused = await client.post(COMPLETIONS, json=ASKED)
        assert refused.headers["retry-after"] == str(int(UNKNOWN_RATE_SECONDS))
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


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
    fleet = Replicas(ScriptedEngine(at_once), ScriptedEngine(at_once))
    async with open_client(ingress(fleet, api_key=KEYS)) as client:
        for headers in (bearer(KEYS[0]), bearer(KEYS[1]), {}):
            await client.post(COMPLETIONS, json=ASKED, headers=headers)
        fleet.running = 0
        await client.post(COMPLETIONS, json=ASKED, headers=bearer(KEYS[0]))
        text = (await client.get("/metrics", headers=bearer(KEYS[0]))).text
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    (requests,) = (family for family in families if family.name == "entrgi:http_requests")
    counted = {tuple(map(each.labels.get, ("replica", "route", "status"))) for each in requests.samples if each.value}
    answered = {("0", COMPLETIONS, "200"), ("1", COMPLETIONS, "200")}
    assert counted == answered | {("ingress", "other", "401"), ("ingress", "other", "503")}


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


def test_serve_is_given_hashes_of_keys_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = "sha256:" + "0" * 64
    keys = tmp_path / "keys"
    keys.write_text(KEYS[0])
    for plain in (KEYS[0], f"{hashed},{KEYS[0]}", [KEYS[0]], f"file:{keys}"):
        with pytest.raises(SettingsError, match=r"api_key: .*sha256:HEX") as refused:
            read({"api_key": plain})
        assert KEYS[0] not in str(refused.value)
    assert read({"api_key": hashed}).api_key == (hashed,)
    monkeypatch.setenv("ENTRGI_API_KEY", KEYS[0])
    assert read({"max_queue": "64"}).api_key == (KEYS[0],)


def test_a_replica_forgets_the_keys_of_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ENTRGI_API_KEY", "entrgi_api_key", "ENTRGI_MAX_QUEUE"):
        monkeypatch.setenv(name, "12345678")
    forget_keys()
    assert [name for name in os.environ if name.upper().startswith("ENTRGI_")] == ["ENTRGI_MAX_QUEUE"]


@pytest.mark.parametrize(
    ("settings", "cpus", "gpus"),
    [
        ({"device": "cpu"}, 1, 0),
        ({"device": "cpu", "reward_device": "cpu", "threads": 3, "data_parallel": 2}, 6, 0),
        ({}, 1, 1),
        ({"device": "cuda", "reward_device": "cpu", "data_parallel": 2}, 2, 2),
        ({"device": "cpu", "reward_device": "cuda"}, 1, 1),
        ({"device": "cuda", "reward_device": "cuda:1"}, 1, 2),
        ({"device": "cuda:0", "reward_device": "cuda:2", "data_parallel": 2}, 2, 4),
    ],
)
def test_a_replica_gets_the_cores_and_gpus_of_all_its_workers(settings: dict[str, Any], cpus: int, gpus: int) -> None:
    assert resources(divided(load(settings))[1]) == {"num_cpus": cpus, "num_gpus": gpus}

"""Files and batches, asked by OpenAI's own client over HTTP: their life, whose they are, what is refused."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from server.errors import Draining, QueueFull
from server.types import Job
from server.wire.messages import Event, Failed
from tests.api.batch_client import CHAT, batching, begun, counts, ended, line, results, sent, until, why_failed
from tests.api.scripted_engine import (
    KEYS,
    ScriptedEngine,
    at_once,
    bearer,
    check_envelope,
    make,
    never,
    open_client,
    serving,
)


async def test_a_batch_from_its_file_to_its_answers(tmp_path: Path) -> None:
    async with batching(tmp_path) as client:
        file = await client.files.create(file=sent([line("a"), "", line("b", seed=7)]), purpose="batch")
        assert (file.object, file.filename, file.purpose, file.bytes) == (
            "file",
            "requests.jsonl",
            "batch",
            len(sent([line("a"), "", line("b", seed=7)])[1]),
        )
        assert (await client.files.content(file.id)).text.count("custom_id") == 2
        asked: dict[str, Any] = {"endpoint": "/v1/completions", "completion_window": "24h", "metadata": {"for": "me"}}
        batch = await client.batches.create(input_file_id=file.id, **asked)
        assert batch.expires_at == batch.created_at + 86_400
        batch = await ended(client, batch)
        assert (batch.status, counts(batch), batch.error_file_id) == ("completed", (2, 2, 0), None)
        assert batch.metadata == {"for": "me"}
        assert batch.completed_at
        a, b = sorted(await results(client, batch.output_file_id), key=lambda each: str(each["custom_id"]))
        assert (a["custom_id"], a["error"], a["response"]["status_code"]) == ("a", None, 200)
        assert a["response"]["body"]["choices"][0]["text"] == "Hi"
        assert isinstance(a["response"]["body"]["guidance"]["seed"], int)  # that was drawn
        assert b["response"]["body"]["guidance"]["seed"] == 7
        assert b["response"]["request_id"] in b["response"]["body"]["id"]
        assert [each.id async for each in client.batches.list(limit=1)] == [batch.id]
        assert {each.id async for each in client.files.list(limit=1)} == {file.id, batch.output_file_id}
        assert [each.id async for each in client.files.list(purpose="batch")] == [file.id]
        for each in (file.id, batch.output_file_id):
            assert each is not None
            assert (await client.files.delete(each)).deleted
            with pytest.raises(openai.NotFoundError):
                await client.files.retrieve(each)
        assert [path.name for path in (tmp_path / "files").iterdir()] == []


async def test_what_is_wrong_with_a_line_is_its_own_error(tmp_path: Path) -> None:
    async def some(job: Job) -> AsyncIterator[Event]:
        if job.sampling.seed == 13:
            yield Failed(job.id, "internal", "an internal error ended this request")
            return
        async for event in at_once(job):
            yield event

    wrong: dict[str, tuple[str | None, int]] = {
        "nonsense": (None, 400),
        "[1]": (None, 400),
        json.dumps({"custom_id": "x"}): ("method", 400),
        json.dumps({"method": "POST", "url": "/v1/completions", "body": {}}): ("custom_id", 400),
        line("y", url=CHAT): ("url", 400),
        line("good-0"): ("custom_id", 400),
        line("z", guidance={"method": "entrgi", "eta": -1}): ("guidance.eta", 400),
        line("s", stream=True): ("stream", 400),
        line("m", model="nobody"): ("model", 404),
        line("u", unknown=1): ("unknown", 400),
        line("long", suffix="x" * 2000): (None, 413),
        line("broken", seed=13): (None, 500),
    }
    lines = [each for index, bad in enumerate(wrong) for each in (line(f"good-{index}"), bad)]
    async with batching(tmp_path, ScriptedEngine(some), max_body_bytes=1024) as client:
        batch = await ended(client, await begun(client, lines))
        assert (batch.status, counts(batch)) == ("completed", (24, 12, 12))
        answered = await results(client, batch.output_file_id)
        assert {each["custom_id"] for each in answered} == {f"good-{index}" for index in range(12)}
        failures = await results(client, batch.error_file_id)
    found = {each["response"]["body"]["error"]["message"].partition(":")[0]: each["response"] for each in failures}
    assert len(found) == len(wrong)
    for number, (param, status) in enumerate(wrong.values(), 1):
        response = found[f"line {2 * number}"]
        assert (response["body"]["error"]["param"], response["status_code"]) == (param, status), number


@pytest.mark.parametrize("endpoint", [CHAT, "/v1/responses"])
async def test_other_endpoints(tmp_path: Path, endpoint: str) -> None:
    field = {CHAT: "messages", "/v1/responses": "input"}[endpoint]
    body = {field: [{"role": "user", "content": "Hi"}], "guidance": "bon", "best_of": 1}
    asked = json.dumps({"custom_id": "a", "method": "POST", "url": endpoint, "body": body})
    engine = ScriptedEngine(at_once)
    async with batching(tmp_path, engine) as client:
        batch = await ended(client, await begun(client, [asked], endpoint))
        (answer,) = await results(client, batch.output_file_id)
    assert [job.priority for job in engine.jobs] == [1]
    assert answer["response"]["body"]["guidance"]["method"] == "bon"


async def test_a_cancelled_batch_keeps_what_was_answered(tmp_path: Path) -> None:
    async def some(job: Job) -> AsyncIterator[Event]:
        async for event in (never if job.sampling.seed else at_once)(job):
            yield event

    async with batching(tmp_path, ScriptedEngine(some), max_queue=8) as client:
        batch = await begun(client, [line(f"line-{index}", seed=int(index > 1)) for index in range(9)])
        batch = await until(client, batch, lambda each: counts(each)[1] == 2)
        assert batch.status == "in_progress"
        with pytest.raises(openai.BadRequestError, match="unfinished batch"):
            await client.files.delete(batch.input_file_id)
        assert (await client.batches.cancel(batch.id)).status == "cancelling"
        batch = await ended(client, batch)
        assert (batch.status, counts(batch)) == ("cancelled", (9, 2, 7))
        assert {each["custom_id"] for each in await results(client, batch.output_file_id)} == {"line-0", "line-1"}
        errors = await results(client, batch.error_file_id)
        assert {each["custom_id"] for each in errors} == {f"line-{index}" for index in range(2, 9)}
        assert {each["error"]["code"] for each in errors} == {"batch_cancelled"}
        with pytest.raises(openai.BadRequestError, match="nothing to cancel"):
            await client.batches.cancel(batch.id)


async def test_a_file_without_lines_and_one_with_too_many_fail_their_batches(tmp_path: Path) -> None:
    async with batching(tmp_path) as client:
        assert await why_failed(client, await begun(client, ["", " "])) == ("empty_file", "input_file_id")
        assert await why_failed(client, await begun(client, ["1"] * 50_001)) == ("too_many_lines", "input_file_id")


async def test_a_line_has_no_deadline_but_its_own(tmp_path: Path) -> None:
    engine = ScriptedEngine(at_once)
    async with batching(tmp_path, engine, request_timeout=60) as client:
        await ended(client, await begun(client, [line("a"), line("b", timeout=30)]))
    assert sorted(job.deadline is None for job in engine.jobs) == [False, True]


async def test_another_key_neither_sees_nor_uses_what_is_not_its_own(tmp_path: Path) -> None:
    async with batching(tmp_path) as client:
        other = client.with_options(api_key=KEYS[1])
        batch = await ended(client, await begun(client, [line("a")]))
        assert batch.output_file_id is not None
        for identity in (batch.input_file_id, batch.output_file_id):
            for call in (other.files.retrieve, other.files.content, other.files.delete):
                with pytest.raises(openai.NotFoundError):
                    await call(identity)
        for ask in (other.batches.retrieve, other.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                await ask(batch.id)
        asked: dict[str, Any] = {"endpoint": "/v1/completions", "completion_window": "24h"}
        with pytest.raises(openai.NotFoundError) as refused:
            await other.batches.create(input_file_id=batch.input_file_id, **asked)
        assert refused.value.param == "input_file_id"
        assert [each async for each in other.files.list()] == [each async for each in other.batches.list()] == []
        with pytest.raises(openai.BadRequestError, match="after"):
            await other.files.list(after=batch.input_file_id)


async def test_what_is_no_file_for_a_batch_is_refused(tmp_path: Path) -> None:
    def form(size: int, **fields: str) -> dict[str, Any]:
        return {"files": {"file": ("a.jsonl", b"x" * size)}, "data": {"purpose": "batch"} | fields}

    async with (
        serving(batch_dir=str(tmp_path), api_key=KEYS, batch_file_bytes=2048) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}/v1", headers=bearer(KEYS[0])) as client,
    ):
        kept = (await client.post("/files", **form(2048))).json()
        head = await client.head(f"/files/{kept['id']}/content")
        assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", "2048")
        for asked, status, param in (
            (form(2049), 413, "file"),
            (form(100_000), 413, None),
            (form(1, purpose="fine-tune"), 400, "purpose"),
            (form(1, **{"expires_after[seconds]": "3600"}), 400, "expires_after[seconds]"),
            ({"files": {"purpose": (None, "batch")}}, 400, "file"),
            ({"files": [("file", ("a.jsonl", b"x"))] * 2, "data": {"purpose": "batch"}}, 400, None),
            (form(1) | {"data": {"purpose": ["batch", "batch"]}}, 400, None),
            ({"json": {"purpose": "batch"}}, 415, None),
            ({"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=b"}}, 400, None),
            ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, None),
        ):
            assert check_envelope(await client.post("/files", **asked), status)["param"] == param
        for query, param in (("limit=0", "limit"), ("order=up", "order"), ("colour=red", "colour")):
            assert check_envelope(await client.get(f"/files?{query}"), 400)["param"] == param
        for name in ("file-0", "..", "%2e%2e%2fbatches", "file-" + "0" * 24):
            assert (await client.get(f"/files/{name}/content")).status_code == 404

        async def pieces() -> AsyncIterator[bytes]:
            yield b'--b\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
            for _ in range(8):
                yield b"x" * 16_384

        streamed = {"content-type": "multipart/form-data; boundary=b"}
        assert (await client.post("/files", content=pieces(), headers=streamed)).status_code == 413
        assert len((await client.get("/files")).json()["data"]) == len([*(tmp_path / "files").glob("*.jsonl")]) == 1


async def test_a_line_waits_for_room_and_a_draining_server_answers_none(tmp_path: Path) -> None:
    engine = ScriptedEngine(at_once, refuse=QueueFull("no room", retry_after=0.01))
    async with batching(tmp_path, engine) as client:
        batch = await until(client, await begun(client, [line("a")]), lambda each: each.status == "in_progress")
        engine.refuse = Draining("the server is shutting down")
    async with batching(tmp_path, ScriptedEngine(at_once)) as client:
        assert counts(await ended(client, batch)) == (1, 1, 0)


async def test_without_the_setting_there_are_no_such_routes() -> None:
    async with open_client(make()) as client:
        for path in ("/v1/files", "/v1/batches"):
            check_envelope(await client.get(path), 404)


async def test_pages_of_named_origins_may_remove_files(tmp_path: Path) -> None:
    asked = {"origin": "http://page", "access-control-request-method": "DELETE"}
    async with open_client(make(batch_dir=str(tmp_path), cors_origins=["http://page"])) as client:
        assert (await client.options("/v1/files/file-0", headers=asked)).status_code == 200


async def test_the_routes_are_documented(tmp_path: Path) -> None:
    document = make(batch_dir=str(tmp_path)).openapi()
    assert "multipart/form-data" in document["paths"]["/v1/files"]["post"]["requestBody"]["content"]
    for name in ("FileObject", "FileList", "Batch", "BatchList", "CreateBatchRequest", "Counts", "Problem", "Deleted"):
        for field, about in document["components"]["schemas"][name]["properties"].items():
            assert about.get("description"), f"{name}.{field}"
            assert field != "owner"

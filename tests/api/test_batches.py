"""Files and batches, asked by OpenAI's own client over HTTP: their life, whose they are, what is refused, and that they
outlive the server."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import Batch

from server.api.lines import Results
from server.api.store import lock
from server.errors import ConfigurationError, Draining, QueueFull
from server.front.engine import Engine
from server.types import Job
from server.wire.messages import Event, Failed
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
from tests.support.serving import Launch, golden_flags, wait_for

CHAT = "/v1/chat/completions"
ENDED = ("completed", "failed", "expired", "cancelled")
Lines = list[dict[str, Any]]


def line(name: str, url: str = "/v1/completions", **body: Any) -> str:
    return json.dumps({"custom_id": name, "method": "POST", "url": url, "body": {"prompt": "Hi"} | body})


def sent(lines: list[str]) -> tuple[str, bytes]:
    return "requests.jsonl", "\n".join(lines).encode()


@asynccontextmanager
async def batching(folder: Path, engine: Engine | None = None, **settings: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    """A client of a server that keeps its batches in this folder."""
    async with (
        serving(engine, batch_dir=str(folder), api_key=KEYS, **settings) as port,
        openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEYS[0], max_retries=0) as client,
    ):
        yield client


async def begun(client: openai.AsyncOpenAI, lines: list[str], endpoint: Any = "/v1/completions") -> Batch:
    file = await client.files.create(file=sent(lines), purpose="batch")
    return await client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h")


async def until(client: openai.AsyncOpenAI, batch: Batch, reached: Callable[[Batch], bool]) -> Batch:
    async with asyncio.timeout(60):
        while not reached(batch):
            await asyncio.sleep(0.01)
            batch = await client.batches.retrieve(batch.id)
    return batch


async def ended(client: openai.AsyncOpenAI, batch: Batch) -> Batch:
    return await until(client, batch, lambda each: each.status in ENDED)


async def results(client: openai.AsyncOpenAI, identity: str | None) -> Lines:
    """The lines of a file; none where there is no file."""
    return parsed((await client.files.content(identity)).text) if identity else []


def parsed(text: str) -> Lines:
    return [json.loads(each) for each in text.splitlines()]


def counts(batch: Batch) -> tuple[int, int, int]:
    assert batch.request_counts is not None
    return batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed


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


async def test_a_server_that_stops_leaves_lines_to_the_next_and_those_past_their_time_are_given_up(
    tmp_path: Path,
) -> None:
    async with batching(tmp_path, ScriptedEngine(never)) as client:
        first, late = [await begun(client, [line("a"), line("b")]) for _ in range(2)]
        await until(client, late, lambda each: each.status == "in_progress")
    record = tmp_path / "batches" / f"{late.id}.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"expires_at": int(time.time())}))
    async with batching(tmp_path) as client:
        assert (await ended(client, first)).status == "completed"
        late = await ended(client, late)
        assert (late.status, counts(late)) == ("expired", (2, 0, 2))
        assert {each["error"]["code"] for each in await results(client, late.error_file_id)} == {"batch_expired"}


async def test_an_empty_file_fails_its_batch(tmp_path: Path) -> None:
    async with batching(tmp_path) as client:
        batch = await ended(client, await begun(client, ["", " "]))
        assert batch.errors is not None
        assert batch.errors.data is not None
        assert (batch.status, batch.errors.data[0].param) == ("failed", "input_file_id")


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


async def test_files_expire_unless_a_batch_reads_them(tmp_path: Path) -> None:
    async with batching(tmp_path, ScriptedEngine(never), batch_expire_seconds=1) as client:
        batch = await begun(client, [line("a")])
        unused = await client.files.create(file=sent([line("b")]), purpose="batch")
        listed = {batch.input_file_id, unused.id}
        while listed != {batch.input_file_id}:
            await asyncio.sleep(0.05)
            listed = {each.id async for each in client.files.list()}
        assert [path.stem for path in (tmp_path / "files").glob("*.json")] == [batch.input_file_id]


async def test_a_line_waits_for_room_and_a_draining_server_answers_none(tmp_path: Path) -> None:
    engine = ScriptedEngine(at_once, refuse=QueueFull("no room", retry_after=0.01))
    async with batching(tmp_path, engine) as client:
        batch = await until(client, await begun(client, [line("a")]), lambda each: each.status == "in_progress")
        engine.refuse = Draining("the server is shutting down")
    async with batching(tmp_path, ScriptedEngine(at_once)) as client:
        assert counts(await ended(client, batch)) == (1, 1, 0)


def test_what_a_crash_left_of_a_result_is_not_a_result(tmp_path: Path) -> None:
    paths = tmp_path / "answers", tmp_path / "errors"
    made = Results("batch_req_0", *paths)
    made.add([(1, "a", {"response": {}}), (2, "b", {"response": {}})], failed=False)
    made.add([(2, "b", {"error": {}}), (3, None, {"error": {}})], failed=True)  # the second line is done already
    whole = paths[0].read_bytes()
    for torn in (whole[:-1], whole[:-20], whole + b"\0" * 10, whole + whole[:20]):
        paths[0].write_bytes(torn)
        again = Results("batch_req_0", *paths)
        kept = 1 if len(torn) < len(whole) else 2
        assert (again.counts, len(again.numbers)) == ([kept, 1], kept + 1)
        again.add([(9, "c", {"response": {}})], failed=False)
        assert [each["custom_id"] for each in parsed(paths[0].read_text())] == [*"ab"[:kept], "c"]


async def test_a_folder_is_one_servers(tmp_path: Path) -> None:
    with lock(tmp_path), pytest.raises(ConfigurationError, match="another server"):
        lock(tmp_path)
    lock(tmp_path).close()


async def test_without_the_setting_there_are_no_such_routes() -> None:
    async with open_client(make()) as client:
        for path in ("/v1/files", "/v1/batches"):
            check_envelope(await client.get(path), 404)


async def test_the_routes_are_documented(tmp_path: Path) -> None:
    document = make(batch_dir=str(tmp_path)).openapi()
    assert "multipart/form-data" in document["paths"]["/v1/files"]["post"]["requestBody"]["content"]
    for name in ("FileObject", "FileList", "Batch", "BatchList", "CreateBatchRequest", "Counts", "Problem", "Deleted"):
        for field, about in document["components"]["schemas"][name]["properties"].items():
            assert about.get("description"), f"{name}.{field}"
            assert field != "owner"


GUIDED = {"max_tokens": 24, "best_of": 2, "guidance": {"method": "entrgi", "gradient_steps": 1}}


@pytest.mark.slow
def test_each_line_is_answered_once_though_the_server_is_killed_half_way(launch: Launch, tmp_path: Path) -> None:
    flags = [*golden_flags("dream-tiny"), "--batch-dir", str(tmp_path), "--max-queue", "8"]
    lines = [line(f"line-{index}", **GUIDED) for index in range(30)]
    first = launch(*flags, model=None)
    first.wait_ready()
    with openai.OpenAI(base_url=f"{first.url}/v1", api_key="none") as client:
        file = client.files.create(file=sent(lines), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        wait_for(lambda: counts(client.batches.retrieve(batch.id))[1] >= 3)
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    (written,) = (tmp_path / "files").glob("*-output.jsonl")
    before = {each["custom_id"]: each for each in map(json.loads, written.read_bytes().split(b"\n")[:-1])}
    assert 3 <= len(before) < 30
    second = launch(*flags, model=None)
    second.wait_ready()
    with openai.OpenAI(base_url=f"{second.url}/v1", api_key="none") as client:
        wait_for(lambda: client.batches.retrieve(batch.id).status == "completed")
        batch = client.batches.retrieve(batch.id)
        assert (counts(batch), batch.error_file_id) == ((30, 30, 0), None)
        assert batch.output_file_id is not None
        answers = parsed(client.files.content(batch.output_file_id).text)
    assert sorted(each["custom_id"] for each in answers) == sorted(f"line-{index}" for index in range(30))
    assert [each for each in answers if each["custom_id"] in before] == [*before.values()]
    # A line can be reproduced: its seed was drawn, and is told.
    (one,) = [each["response"]["body"] for each in answers if each["custom_id"] == "line-29"]
    again = second.post("/v1/completions", {"prompt": "Hi", **GUIDED, "seed": one["guidance"]["seed"]}).json()
    assert (again["choices"], again["guidance"]["rewards"]) == (one["choices"], one["guidance"]["rewards"])
    assert second.metric("batch_lines_total", status="completed") == 30 - len(before)
    assert second.metric("batches", status="completed") == 1
    assert second.stop() == 0

"""The folder of files and batches: what is in it outlives the server, however that ended, and expires."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from pathlib import Path

import httpx
import openai
import pytest

from server.api.lines import Results
from server.api.store import lock
from server.errors import ConfigurationError
from tests.api.batch_client import batching, begun, counts, ended, line, parsed, results, sent, until, why_failed
from tests.api.scripted_engine import KEYS, ScriptedEngine, bearer, never
from tests.support.serving import Launch, golden_flags, wait_for


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


async def test_a_batch_whose_file_is_gone_fails(tmp_path: Path) -> None:
    async with batching(tmp_path, ScriptedEngine(never)) as client:
        batch = await begun(client, [line("a")])
        await until(client, batch, lambda each: each.status == "in_progress")
    for path in (tmp_path / "files").glob(f"{batch.input_file_id}.*"):
        path.unlink()
    async with batching(tmp_path) as client:
        assert await why_failed(client, batch) == ("input_file_gone", "input_file_id")


async def test_no_name_and_no_record_keeps_a_server_from_starting(tmp_path: Path) -> None:
    form = (
        b'--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        b'--b\r\ncontent-disposition: form-data; name="file"; filename="+2AA-"\r\n\r\n1\r\n--b--\r\n'
    )
    headers = bearer(KEYS[0]) | {"content-type": "multipart/form-data; boundary=b; charset=utf-7"}
    async with batching(tmp_path) as client, httpx.AsyncClient(headers=headers) as http:
        sent_file = (await http.post(f"{client.base_url}files", content=form)).json()
        assert sent_file["filename"] == "?"
        torn = await client.files.create(file=sent([line("a")]), purpose="batch")
    for folder, name in (("files", torn.id), ("batches", "batch_0")):
        (tmp_path / folder / f"{name}.json").write_text('{"id": ')
        (tmp_path / folder / f"{name}.part").write_text("")
    async with batching(tmp_path) as client:
        assert [each.id async for each in client.files.list()] == [sent_file["id"]]
        assert (await ended(client, await begun(client, [line("a")]))).status == "completed"
    assert (tmp_path / "files" / f"{torn.id}.jsonl").exists()
    assert not [*(tmp_path / "files").glob("*.part"), *(tmp_path / "batches").glob("*.part")]


async def test_files_expire_unless_a_batch_reads_them(tmp_path: Path) -> None:
    async with batching(tmp_path, ScriptedEngine(never)) as client:
        batch = await begun(client, [line("a")])
        await client.files.create(file=sent([line("b")]), purpose="batch")
    for record in (tmp_path / "files").glob("*.json"):
        record.write_text(json.dumps(json.loads(record.read_text()) | {"expires_at": 1}))
    async with batching(tmp_path, ScriptedEngine(never)) as client, asyncio.timeout(60):
        listed: set[str] = set()
        while listed != {batch.input_file_id}:
            await asyncio.sleep(0.01)
            listed = {each.id async for each in client.files.list()}


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


def test_a_custom_id_belongs_to_the_line_that_came_first_and_not_to_one_that_failed(tmp_path: Path) -> None:
    paths = tmp_path / "answers", tmp_path / "errors"
    made = Results("batch_req_0", *paths)
    assert (made.first("a", 5), made.first("a", 1)) == (5, 5)
    made.add([(1, "a", {"error": {}})], failed=True)
    assert Results("batch_req_0", *paths).first("a", 5) == 5


async def test_a_folder_is_one_servers(tmp_path: Path) -> None:
    with lock(tmp_path), pytest.raises(ConfigurationError, match="another server"):
        lock(tmp_path)
    lock(tmp_path).close()


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

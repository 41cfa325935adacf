"""Many requests to servers that are full, that go away, that refuse; and a run that is killed: each request is answered
once, and no more is asked than that."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from clients.cli import main
from clients.errors import AuthenticationFailed, ClientError, ConnectionFailed
from clients.runs import engine
from clients.runs.batch import requests_of
from clients.runs.engine import Servers, answer_all
from clients.runs.journal import Journal, Request, request
from tests.support.scorers import Stub, ok, stub
from tests.support.serving import ROOT, wait_for

REQUESTS = [request("/v1/chat/completions", {"number": number}) for number in range(20)]
Answer = Callable[[str, int], httpx.Response]


def echo(_: str, number: int) -> httpx.Response:
    return httpx.Response(200, json={"number": number}, headers={"x-request-id": f"r-{number}"})


class Network(httpx.AsyncBaseTransport):
    """Servers that answer as `answer` says of (host, number), and what was asked of them."""

    def __init__(self, answer: Answer = echo) -> None:
        self.answer = answer
        self.asked: list[tuple[str, int]] = []
        self.turns: dict[str, int] = {}  # of the event loop that a host takes for an answer; else one
        self.seconds: dict[str, float] = {}  # that it takes, whatever a wait costs

    async def handle_async_request(self, sent: httpx.Request) -> httpx.Response:
        number = json.loads(await sent.aread())["number"]
        self.asked.append((sent.url.host, number))
        for _ in range(self.turns.get(sent.url.host, 1)):
            await asyncio.sleep(0)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.seconds.get(sent.url.host, 0.0)):
                await asyncio.Event().wait()
        return self.answer(sent.url.host, number)


def only(there: str) -> Answer:
    """One server; all others are gone."""

    def answer(host: str, number: int) -> httpx.Response:
        if host != there:
            raise httpx.ConnectError("refused")
        return echo(host, number)

    return answer


def run(path: Path, network: Network, *hosts: str, requests: list[Request] = REQUESTS) -> dict[int, Any]:
    """The bodies of the answers by number, after a run to the end."""
    servers = Servers([f"http://{host}" for host in hosts or ("one",)], 3, transport=network)
    with Journal(path) as journal:
        answer_all(requests, journal, servers, "test")
        records = list(journal.records())
    assert len({record.custom_id for record in records}) == len(records)
    return {record.request.body["number"]: record.response.body for record in records}


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waits are noted and cost a turn, not the time."""
    noted: list[float] = []
    turn = asyncio.sleep

    async def sleep(seconds: float) -> None:
        if seconds:
            noted.append(seconds)
        await turn(0)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    return noted


def test_the_journal_has_the_form_of_openais_batch_output(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    assert run(path, Network()) == {number: {"number": number} for number in range(20)}
    line = json.loads(path.read_text("utf-8").splitlines()[0])
    assert {"id", "custom_id", "response", "error"} <= line.keys()
    number = line["request"]["body"]["number"]
    assert line["custom_id"] == REQUESTS[number].custom_id
    assert line["response"] == {"status_code": 200, "request_id": f"r-{number}", "body": {"number": number}}


def test_a_journal_that_was_cut_anywhere_is_gone_on_from(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    run(path, Network())
    whole = path.read_bytes()
    for cut in (0, 1, len(whole) // 2, len(whole) - 1, len(whole)):
        path.write_bytes(whole[:cut])
        kept = whole[:cut].count(b"\n")
        network = Network()
        assert run(path, network).keys() == set(range(20))
        assert len(network.asked) == 20 - kept
        assert path.read_bytes().startswith(whole[: whole.rfind(b"\n", 0, cut) + 1])


@pytest.mark.parametrize(
    "content", [b"Hotel?\n", b'{"prompt": "Hotel?"}\n', b"{}", b'{"custom_id":"a","url":"/v1/score","body":{}}']
)
def test_another_file_is_not_taken_for_a_journal(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_bytes(content)
    with pytest.raises(ClientError, match=r"prompts\.jsonl, line 1,.*name another file"):
        Journal(tmp_path / "prompts.jsonl")
    assert (tmp_path / "prompts.jsonl").read_bytes() == content
    with pytest.raises(ClientError, match=r"absent.* cannot be written"):
        Journal(tmp_path / "absent" / "runs.jsonl")


def test_a_batch_takes_no_answer_to_another_request_of_the_same_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    same = Request("a", "/v1", {"number": 1.0})
    run(out, Network(), requests=[same, Request("left out of the file", "/v1", {"number": 2})])
    for line, status in ((same, 0), (Request("a", "/v1", {"number": 3}), 1)):
        asked.write_bytes(msgspec.json.encode(line))
        before = out.read_bytes()
        assert main(["batch", str(asked), str(out), "--url", "http://nobody.invalid"]) == status
        assert out.read_bytes() == before
    said = " ".join(capsys.readouterr().err.split())
    assert "has an answer to another request named 'a'; name another file" in said


POST_TO_A_PATH = "wanted are the method POST and a url that is a path"


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        *(({"url": url}, POST_TO_A_PATH) for url in ("http://elsewhere/v1", "//elsewhere/v1", "v1")),
        ({"method": "GET"}, POST_TO_A_PATH),
        ({"url": "/v1\x01"}, "'/v1\\x01' is no path"),
        ({"url": None}, "is no request of OpenAI's batch format"),
        ({"custom_id": "a"}, "'a' stands on a line before it"),
        ({"body": {"stream": True}}, "`stream` has no place"),
    ],
)
def test_a_wrong_line_of_a_batch_is_named_and_its_key_goes_to_the_named_servers_alone(
    wrong: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, line = tmp_path / "in.jsonl", {"custom_id": "a", "method": "POST", "url": "/v1", "body": {}}
    path.write_text(json.dumps(line))
    assert requests_of(str(path)) == [Request("a", "/v1", {})]
    path.write_text(f"{json.dumps(line)}\n\n{json.dumps(line | {'custom_id': 'b'} | wrong)}")
    assert main(["batch", str(path), str(tmp_path / "out.jsonl"), "--url", "http://nobody.invalid"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert f"{path}, line 3" in said
    assert told in said


def test_equal_requests_are_asked_once(tmp_path: Path) -> None:
    network = Network()
    requests = [request("/v1", {"number": 1, "a": 2}), request("/v1", {"a": 2, "number": 1})]
    run(tmp_path / "runs.jsonl", network, requests=requests)
    assert len(network.asked) == 1


def test_a_full_server_is_left_alone_as_long_as_it_asks_and_a_free_one_gets_its_requests(
    tmp_path: Path, waits: list[float]
) -> None:
    full = httpx.Response(429, json={"error": {"message": "full"}}, headers={"retry-after": "7"})
    network = Network(lambda host, number: full if host == "full" else echo(host, number))
    assert run(tmp_path / "runs.jsonl", network, "full", "free").keys() == set(range(20))
    assert waits
    assert set(waits) == {7.0}


def test_a_server_that_goes_away_takes_no_request_along(tmp_path: Path, waits: list[float]) -> None:
    answered = Counter[str]()

    def leaving(host: str, number: int) -> httpx.Response:
        answered[host] += 1
        if host == "leaves" and answered[host] > 4:
            raise httpx.ReadError("reset by peer")
        return echo(host, number)

    network = Network(leaving)
    assert run(tmp_path / "runs.jsonl", network, "leaves", "stays").keys() == set(range(20))
    assert {host for host, _ in network.asked} == {"leaves", "stays"}
    assert len(waits) >= 1


def test_what_a_server_refuses_has_the_refusal_for_an_answer(tmp_path: Path) -> None:
    refusal = {"error": {"message": "too long", "param": "messages"}}
    network = Network(lambda host, number: httpx.Response(400, json=refusal) if number == 3 else echo(host, number))
    assert run(tmp_path / "runs.jsonl", network)[3] == refusal
    assert len(network.asked) == 20
    run(tmp_path / "runs.jsonl", network)
    assert len(network.asked) == 20


SICK = httpx.Response(500, json={"error": {"message": "sick"}})
PAGE = httpx.Response(502, text="<h1>Bad gateway</h1>")
MISSING = httpx.Response(404, json={"error": {"message": "no such model"}})
BYTES = httpx.Response(200, content=b'{"a": "\xff"}')
MOVED = httpx.Response(302, json={}, headers={"location": "http://elsewhere/"})


def test_a_request_that_fails_in_the_server_again_and_again_holds_nobody_up(tmp_path: Path, waits: list[float]) -> None:
    network = Network(lambda host, number: SICK if number == 5 else echo(host, number))
    assert run(tmp_path / "runs.jsonl", network)[5] == {"error": {"message": "sick"}}
    assert Counter(number for _, number in network.asked)[5] == engine.ATTEMPTS
    assert run(tmp_path / "runs.jsonl", Network())[5] == {"number": 5}  # it is asked again, and nothing else is


@pytest.mark.parametrize(
    "answer",
    [SICK, PAGE, MISSING, MOVED, httpx.Response(200, text="<h1>Welcome</h1>"), httpx.Response(200, json=[1]), BYTES],
    ids=["500", "502 and a page", "404", "302", "200 and a page", "200 and a list", "200 and no text"],
)
def test_what_a_sick_server_says_is_no_answer_where_another_has_one(
    answer: httpx.Response, tmp_path: Path, waits: list[float]
) -> None:
    """The sick one is much faster, and would have them all."""
    network = Network(lambda host, number: answer if host == "sick" else echo(host, number))
    network.turns = {"good": 50}
    assert run(tmp_path / "runs.jsonl", network, "sick", "good") == {number: {"number": number} for number in range(20)}
    assert {host for host, _ in network.asked} == {"sick", "good"}


def test_a_server_that_starts_again_behind_a_proxy_has_failed_nobody(tmp_path: Path, waits: list[float]) -> None:
    calls = Counter[str]()

    def starting(host: str, number: int) -> httpx.Response:
        calls[host] += 1
        return PAGE if calls[host] < 200 else echo(host, number)

    assert run(tmp_path / "runs.jsonl", Network(starting)) == {number: {"number": number} for number in range(20)}


def test_a_wait_that_a_server_asks_for_has_an_end(tmp_path: Path, waits: list[float]) -> None:
    away = [httpx.Response(503, json={"error": {"message": "later"}}, headers={"retry-after": "86400"})]
    run(tmp_path / "runs.jsonl", Network(lambda *asked: away.pop() if away else echo(*asked)))
    assert waits == [60.0]


def test_what_a_server_keeps_for_long_another_one_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "PATIENCE_SECONDS", 0.2)
    network = Network()
    network.seconds = {"hangs": 3600.0}
    assert run(tmp_path / "runs.jsonl", network, "hangs", "good") == {
        number: {"number": number} for number in range(20)
    }


def test_a_server_without_the_model_does_not_profit_from_anothers_broken_connections(
    tmp_path: Path, waits: list[float]
) -> None:
    broken = [httpx.ReadError("reset by peer")] * 3

    def answer(host: str, number: int) -> httpx.Response:
        if host == "good" and broken:
            network.seconds = {"good": 0.2}
            raise broken.pop()
        return echo(host, number) if host == "good" else MISSING

    network = Network(answer)
    answers = run(tmp_path / "runs.jsonl", network, "sick", "good", requests=REQUESTS[:6])
    assert answers == {number: {"number": number} for number in range(6)}


def test_a_server_that_loads_for_ever_holds_nobody_up(
    tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "PATIENCE_SECONDS", 0.2)
    loading = httpx.Response(503, json={"error": {"message": "loading"}})
    network = Network(lambda host, number: loading if host == "loads" else SICK if number == 5 else echo(host, number))
    assert run(tmp_path / "runs.jsonl", network, "loads", "sick")[5] == {"error": {"message": "sick"}}


def test_what_is_asked_of_a_second_server_is_not_asked_twice_of_the_first(
    tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(engine, "CONNECT_SECONDS", 0.0)
    network = Network(only("slow"))
    network.seconds = {"slow": 1.5}  # longer than idle workers wait for the next request
    assert len(run(tmp_path / "runs.jsonl", network, "slow", "gone", requests=REQUESTS[:1])) == 1
    assert Counter(host for host, _ in network.asked)["slow"] == 1


def test_a_run_goes_on_while_a_server_is_at_work_though_the_others_are_silent(
    tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(engine, "CONNECT_SECONDS", 0.0)
    network = Network(only("slow"))
    network.seconds = {"slow": 0.5}
    assert len(run(tmp_path / "runs.jsonl", network, "slow", "gone", requests=REQUESTS[:6])) == 6


def test_a_journal_is_one_runs_and_a_full_disk_leaves_it_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "runs.jsonl"
    with Journal(path), pytest.raises(ClientError, match=r"another run writes .*runs\.jsonl"):
        Journal(path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(ClientError, match=r"runs\.jsonl cannot be written: File too large"):
            run(path, Network())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert 0 < len(whole := path.read_bytes()) <= 1000
    assert whole.endswith(b"\n")
    assert len(run(path, Network())) == 20


def test_a_refused_key_ends_the_run_and_so_does_silence(
    tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AuthenticationFailed, match="no key"):
        run(tmp_path / "a", Network(lambda *_: httpx.Response(401, json={"error": {"message": "no key"}})))

    monkeypatch.setattr(engine, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(ConnectionFailed, match="no answer from http://one: refused"):
        run(tmp_path / "b", Network(only("other")))


DEFAULTS = {"reward_model": "rm", "best_of": {"bon": 2}, "max_tokens": 8}
MODELS = {"data": [{"id": "dlm", "type": "diffusion", "defaults": DEFAULTS}, {"id": "rm", "type": "reward"}]}


def sampled(made: Stub, body: Any) -> tuple[int, dict[str, str], bytes]:
    """What a server of one model answers. It holds all chats but the first three until it is released."""
    if body is None:
        return ok(MODELS)
    if len(made.asked) > 3:
        made.released.wait()
    choice = {"message": {"content": "Fine."}, "reward": 1.5, "token_ids": [1, 2], "step_map": [0, 1], "trajectory": 0}
    counts = {"steps": 2, "model_calls": 2, "reward_calls": 0, "queue_ms": 0.0, "generation_ms": 1.0}
    report = {"method": "bon", "seed": body["seed"], "rewards": [[1.5, 0.5]], **counts}
    return ok({"id": "a", "model": "dlm", "choices": [{"index": 0, **choice}], "guidance": report})


def test_a_command_that_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("".join(f"Question {number}?\n" for number in range(8)))
    command = [sys.executable, "-m", "clients", "sample", "--prompts", str(tmp_path / "prompts.txt")]
    command += ["--method", "bon", "--concurrency", "1", "--out", str(tmp_path / "data.jsonl")]
    with stub(lambda _, body: sampled(made, body)) as made:
        command += ["--url", made.url]
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as first:
            wait_for(lambda: len(made.asked) == 4)
            first.send_signal(signal.SIGKILL)
        assert not (tmp_path / "data.jsonl").exists()
        made.released.set()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    # The three that were answered are not asked again.
    assert [body["seed"] for _, _, body in made.asked] == [0, 1, 2, 3, 3, 4, 5, 6, 7]
    rows = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text("utf-8").splitlines()]
    assert sorted(row["seed"] for row in rows) == list(range(8))
    assert rows[0]["prompt"] == [{"role": "user", "content": "Question 0?"}]
    assert rows[0]["completion"] == [{"role": "assistant", "content": "Fine."}]
    assert (rows[0]["rewards"], rows[0]["token_ids"], rows[0]["step_map"]) == ([1.5, 0.5], [1, 2], [0, 1])

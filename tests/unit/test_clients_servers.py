"""Several servers of one run: some are away, some differ, some are none of ours or answer with something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clients.cli import main
from tests.support.scorers import Answer, ok, stub
from tests.support.serving import free_port

DEFAULTS = {"reward_model": "rm", "best_of": {"none": 1, "bon": 2}, "max_tokens": 8, "eta": 0.5}
REPORT = {
    "method": "bon",
    "seed": 0,
    "steps": 2,
    "model_calls": 2,
    "reward_calls": 0,
    "queue_ms": 0,
    "generation_ms": 1,
}
CHOICE = {"index": 0, "message": {"content": "Fine."}, "reward": 1.5, "trajectory": 0}
ANSWER = {"id": "a", "model": "dlm", "choices": [CHOICE], "guidance": {**REPORT, "rewards": [[1.5]]}}


def listing(**changed: Any) -> dict[str, Any]:
    """What /v1/models says, with other defaults."""
    return {"data": [{"id": "dlm", "defaults": DEFAULTS | changed}, {"id": "rm", "type": "reward"}]}


def server(models: Any = None, **others: Any) -> Any:
    """A server that answers every chat, and what `others` says at the end of other paths."""

    def answer(path: str, body: Any) -> Answer:
        if body is None:
            return models if isinstance(models, tuple) else ok(models or listing())
        return ok(others.get(path.rpartition("/")[2], ANSWER))

    return stub(answer)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for a server to come back."""
    monkeypatch.setattr("clients.retry.RetryPolicy.wait", lambda *_: None)


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    (tmp_path / "prompts.txt").write_text("Hotel?\nPhone?\n")
    return ["--prompts", str(tmp_path / "prompts.txt"), "--method", "bon", "--out", str(tmp_path / "data.jsonl")]


LOADING = (503, {"Retry-After": "600"}, b'{"error": {"message": "loading"}}')


@pytest.mark.parametrize("turn", [1, -1])
def test_a_run_starts_with_the_servers_that_are_there(
    turn: int, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    away = f"http://127.0.0.1:{free_port()}"
    with server() as made, server(LOADING) as loading:
        urls = [made.url, away, loading.url][::turn]
        assert main(["sample", *command, *(word for url in urls for word in ("--url", url))]) == 0
    assert len((tmp_path / "data.jsonl").read_text("utf-8").splitlines()) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("going on without a server: ")]
    assert len(told) == 2
    assert any(f"no answer from {away}: " in line for line in told)
    assert any(line.endswith(f"{loading.url}: 503: loading") for line in told)


def test_a_run_does_not_start_where_no_server_is_there(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    urls = [f"http://127.0.0.1:{free_port()}" for _ in range(2)]
    assert main(["sample", *command, "--url", urls[0], "--url", urls[1]]) == 1
    (told,) = capsys.readouterr().err.splitlines()
    assert all(f"no answer from {url}" in told for url in urls)


@pytest.mark.parametrize(
    ("models", "told"),
    [
        (listing(eta=0.1), " has 0.1 for the default eta of dlm, {first} 0.5; one run needs the same defaults"),
        ({"data": listing()["data"][:1]}, " serves other models than {first}"),
        ((404, {}, b"Not found"), ": 404: Not found"),
    ],
)
def test_a_server_that_would_answer_otherwise_is_refused(
    models: Any, told: str, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with server() as first, server(models) as second:
        assert main(["sample", *command, "--url", first.url, "--url", second.url]) == 1
    assert f"{second.url}{told.format(first=first.url)}" in capsys.readouterr().err
    assert first.asked == second.asked == []


@pytest.mark.parametrize("models", [{"data": [{"id": "gpt", "object": "model"}]}, {"data": []}, {"models": []}])
def test_a_server_of_another_kind_is_named(models: Any, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with server(models) as made:
        assert main(["sample", *command, "--url", made.url]) == 1
    assert f"{made.url} is no entrgi server: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("scores", "told"),
    [({"oops": 1}, "missing required field `model`"), ({"model": "other", "data": []}, "0 scores of 1 texts")],
)
def test_scores_of_another_shape_are_named_with_how_to_go_on(
    scores: Any, told: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command += ["--held-out", "other", "--limit", "1", "--url"]
    with server(score=scores) as made:
        for _ in range(2):  # the second time from the journal
            assert main(["compare", *command, made.url]) == 1
            said = capsys.readouterr().err
            assert f"{made.url}/v1/score: " in said
            assert told in said
    name = said.partition("without the line of ")[2].split()[0]
    lines = (tmp_path / "data.jsonl").read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "data.jsonl").write_text("".join(line for line in lines if json.loads(line)["custom_id"] != name))
    with server(score={"model": "other", "data": [{"index": 0, "score": 2.0}]}) as made:
        assert main(["compare", *command, made.url]) == 0
    assert [path for path, _, _ in made.asked] == ["/v1/score"]


def test_a_judge_without_words_gives_no_score(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    empty = {"id": "j", "model": "judge", "choices": []}
    with server() as made, stub(lambda _, body: ok({"data": [{"id": "judge"}]} if body is None else empty)) as judge:
        command += ["--url", made.url, "--judge-url", judge.url]
        for _ in range(2):
            assert main(["compare", *command]) == 0
            assert "judge judge" not in capsys.readouterr().out
    assert len(judge.asked) == 2


def test_a_judge_without_models_is_named(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with server() as made, server({"data": []}) as judge:
        assert main(["compare", *command, "--url", made.url, "--judge-url", judge.url]) == 1
    assert f"{judge.url} lists no model that could judge; name one with --judge-model" in capsys.readouterr().err

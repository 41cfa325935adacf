"""Outside scorers over HTTP, on real models: where they are listed, asked and named, and what their failures are."""

from __future__ import annotations

import json
import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from server.errors import ConfigurationError
from server.scorers.scorer import Scorer
from server.settings import SettingsError, load
from tests.api.scripted_engine import ScriptedEngine, at_once, make
from tests.support.encoders import logits_of, pipeline, write_encoder
from tests.support.scorers import Stub, function, hanging, stub
from tests.support.serving import Launch, Served, golden_flags, wait_for

PROMPT = {"prompt": "go on", "max_tokens": 8, "seed": 7}
LENGTHS = {"name": "length", "target": "python:tests.support.scorers:length", "timeout_seconds": 120}
SCRIPTED = {"target": "python:tests.support.scorers:scripted", "timeout_seconds": 120, "retries": 0}


@pytest.fixture(scope="module")
def mood(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT that tells three moods."""
    return write_encoder(tmp_path_factory.mktemp("mood") / "checkpoint")


@pytest.fixture(scope="module")
def judged(launch: Launch, server: Served, mood: Path) -> Served:
    """A server with two functions, with the shared server as the third scorer, and with an encoder of its own."""
    far = {"name": "far", "target": f"entrgi+{server.url}", "model": "rm", "timeout_seconds": 120}
    scorers = [LENGTHS, {"name": "scripted", "max_concurrency": 2, **SCRIPTED}, far]
    flags = [word for each in scorers for word in ("--scorers", json.dumps(each))]
    encoder = json.dumps({"name": "mood", "path": str(mood), "label": "positive", "output": "log_softmax"})
    started = launch(*golden_flags(), "--reward-model", encoder, *flags, model=None)
    started.wait_ready()
    return started


def guided(*names: str, method: str = "bon", **fields: Any) -> dict[str, Any]:
    weights = [{"model": name, "weight": 1.0 + index} for index, name in enumerate(names)]
    return {**PROMPT, "guidance": {"method": method, "reward_models": weights}, **fields}


def test_scorers_are_listed_behind_the_models(judged: Served) -> None:
    listed = judged.client.get("/v1/models").json()["data"]
    assert [(each["id"], each["type"], each["family"]) for each in listed[-3:]] == [
        ("length", "scorer", "python"),
        ("scripted", "scorer", "python"),
        ("far", "scorer", "entrgi"),
    ]
    one = judged.client.get("/v1/models/length").json()
    assert one["context_length"] is None
    assert "target" not in one


def test_an_encoder_is_a_scorer_of_the_servers_own(judged: Served, mood: Path) -> None:
    """Listed with its label, scored as transformers does, ranked, heard for the choice and while resampling; it has no
    gradient, and reads no more than it can."""
    one = judged.client.get("/v1/models/mood").json()
    told = {"type": "scorer", "family": "bert", "label": "positive", "output": "log_softmax", "input": "response"}
    assert told.items() <= one.items()
    assert (one["context_length"], one["vocab_coverage"]) == (64, None)
    texts = ["It is good.", "terrible", "It is a great licence, or a terrible one!"]
    stock = pipeline(mood)
    expected = [float(logits_of(stock, text).log_softmax(-1)[2]) for text in texts]
    asked = {"model": "mood", "queries": "hello", "documents": texts}
    answer = judged.post("/v1/score", asked).json()
    assert [each["score"] for each in answer["data"]] == pytest.approx(expected, abs=1e-3)
    assert answer["usage"]["total_tokens"] > 0
    best = judged.post("/v1/rerank", {"model": "mood", "query": "hello", "documents": texts}).json()["results"][0]
    assert best["index"] == expected.index(max(expected))
    long = judged.post("/v1/score", asked | {"documents": ["good " * 65]})
    assert long.status_code == 400
    assert "item 0 takes 67 tokens; the context of the reward model is 64" in long.json()["error"]["message"]
    resampled = guided("mood", "rm", best_of=3)
    resampled["guidance"]["resample"] = {"by": "reward", "every": 2, "threshold": 1.0}
    answer = judged.post("/v1/completions", resampled).json()
    assert answer["guidance"]["without_gradient"] == ["mood"]
    rewards = answer["guidance"]["rewards_by_model"]
    assert answer["choices"][0]["reward"] == pytest.approx(
        max(first + 2 * second for first, second in zip(rewards["mood"][0], rewards["rm"][0], strict=True)), abs=1e-4
    )
    refused = judged.post("/v1/completions", guided("mood", method="entrgi"))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "guidance.reward_models")


def test_scorers_score_and_rank(judged: Served) -> None:
    body = {"model": "length", "queries": "hello", "documents": ["abc", "a"]}
    answer = judged.post("/v1/score", body).json()
    assert [each["score"] for each in answer["data"]] == [3.0, 1.0]
    assert answer["usage"] == {"prompt_tokens": 0, "total_tokens": 0}
    body = {"model": "length", "query": "hello", "documents": ["a", "abc", "ab"]}
    assert [each["index"] for each in judged.post("/v1/rerank", body).json()["results"]] == [1, 2, 0]
    body = {"model": "scripted", "queries": "hello", "documents": "x", "metadata": {"do": "metadata"}}
    assert judged.post("/v1/score", body).json()["data"][0]["score"] == len('{"do": "metadata"}')


def test_a_server_of_ours_is_a_scorer_of_another(judged: Served, server: Served) -> None:
    query = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello", "name": "Ann"}]
    body = {"queries": [query, "bye"], "documents": ["yes", "no"]}
    here, there = judged.post("/v1/score", {"model": "far", **body}), server.post("/v1/score", {"model": "rm", **body})
    scores = [[each["score"] for each in answer.json()["data"]] for answer in (here, there)]
    assert scores[0] == scores[1]
    answer = judged.post("/v1/completions", guided("far", "rm", best_of=2)).json()
    rewards = answer["guidance"]["rewards_by_model"]
    assert rewards["far"][0] == pytest.approx(rewards["rm"][0], abs=1e-5)


def test_the_best_by_a_scorer_comes_back(judged: Served) -> None:
    answer = judged.post("/v1/completions", guided("length", n=3, best_of=3)).json()
    lengths = [len(choice["text"]) for choice in answer["choices"]]
    assert lengths == sorted(lengths, reverse=True)
    assert [choice["reward"] for choice in answer["choices"]] == lengths
    assert sorted(answer["guidance"]["rewards"][0]) == sorted(lengths)
    answer = judged.post("/v1/completions", guided("length", method="none", n=2)).json()
    assert [choice["reward"] for choice in answer["choices"]] == [len(each["text"]) for each in answer["choices"]]


def test_a_scorer_resamples_whatever_the_method(judged: Served) -> None:
    resample = {"by": "reward", "every": 2, "strength": 5.0}
    for name, method in (("length", "bon"), ("length", "none"), ("far", "bon")):
        guidance = {"method": method, "reward_model": name, "resample": resample}
        asked = {"stop": ["\n"], "temperature": 1.5, "guidance": guidance}
        answer = judged.post("/v1/completions", {**PROMPT, **asked, ("n" if method == "none" else "best_of"): 3}).json()
        told = answer["guidance"]
        assert told["reward_calls"] == (told["model_calls"] - 1) // 2  # one at each meeting, and none at the end
        assert told["without_gradient"] == [name]
        assert sum(told["weights"][0]) == pytest.approx(1)
        assert told["rewards"][0][told["weights"][0].index(max(told["weights"][0]))] == max(told["rewards"][0])
        assert {step for step, _ in told["resampled"][0]} <= {2, 4, 6}
    assert judged.metric("scorer_requests_total", scorer="far") > 2


def test_scorers_and_reward_models_are_one_weighted_sum(judged: Served) -> None:
    answer = judged.post("/v1/completions", guided("rm", "length", method="entrgi", best_of=2)).json()
    (choice,), guidance = answer["choices"], answer["guidance"]
    assert guidance["without_gradient"] == ["length"]
    assert choice["rewards"]["length"] == len(choice["text"])
    assert choice["reward"] == pytest.approx(choice["rewards"]["rm"] + 2 * choice["rewards"]["length"])
    assert choice["reward"] == max(guidance["rewards"][0])


@pytest.mark.parametrize("do", ["few", "nan", "raise", "die"])
def test_a_scorer_that_fails_is_a_502_with_its_name(do: str, judged: Served) -> None:
    body = guided("rm", "scripted", best_of=2, metadata={"do": do})
    response = judged.post("/v1/completions", body)
    assert response.status_code == 502
    assert response.json()["error"]["code"] == "scorer_failed"
    assert "the scorer scripted" in response.json()["error"]["message"]
    assert ("x-should-retry" in response.headers) == (do == "raise")  # which it would do again
    assert judged.post("/v1/completions", body | {"metadata": {}}).status_code == 200


def test_once_a_stream_has_begun_the_failure_is_an_event_in_it(judged: Served) -> None:
    body = guided("scripted", stream_canvas=True, metadata={"do": "few"})
    first, *_, last = judged.stream("/v1/completions", body)
    assert "canvas" in first
    assert (last["error"]["code"], last["error"]["type"]) == ("scorer_failed", "server_error")


def test_past_the_deadline_the_answer_comes_without_the_reward(judged: Served, tmp_path: Path) -> None:
    there = tmp_path / "there"
    body = guided("scripted", best_of=2, timeout=10, metadata={"do": f"wait {there}"})
    answer = judged.post("/v1/completions", body).json()
    there.touch()  # the call that has begun need not hold its process
    assert answer["guidance"]["rewards"] == [[None, None]]
    assert answer["choices"][0]["reward"] is None
    assert answer["choices"][0]["text"]


def test_a_request_chooses_no_address(judged: Served) -> None:
    """Neither a name, nor a field, nor metadata."""
    with stub(lambda *asked: hanging(lambda: made)(*asked)) as made:
        for target in (f"entrgi+{made.url}", made.url, "python:os:system"):
            _refused(judged, target, made)
    assert not made.asked


def _refused(judged: Served, target: str, made: Stub) -> None:
    pair = {"queries": "a", "documents": "b"}
    assert judged.post("/v1/score", {"model": target, **pair}).status_code == 404
    assert judged.post("/v1/score", {"model": "length", "target": target, **pair}).status_code == 400
    assert judged.post("/v1/completions", guided(target)).status_code == 400
    term = {"model": "length", "target": target}
    guidance = {"method": "bon", "reward_models": [term]}
    assert judged.post("/v1/completions", {**PROMPT, "guidance": guidance}).status_code == 400
    told = {"target": target, "url": made.url, "model": target, "key_env": "PATH"}
    assert judged.post("/v1/completions", guided("length", metadata=told)).status_code == 200


def test_metrics_tell_scorers_apart(judged: Served) -> None:
    judged.post("/v1/score", {"model": "length", "queries": "a", "documents": ["b", "c"]})
    judged.post("/v1/score", {"model": "scripted", "queries": "a", "documents": "raise"})
    assert judged.metric("scorer_requests_total", scorer="length") > 0
    assert judged.metric("scorer_texts_total", scorer="length") > 1
    assert judged.metric("scorer_seconds_count", scorer="length") > 0
    assert judged.metric("scorer_failures_total", scorer="scripted", reason="raised") > 0
    assert judged.metric("scorer_failures_total", scorer="length", reason="raised") == 0
    assert judged.metric("scorer_breaker_open", scorer="scripted") == 0


@pytest.mark.slow
def test_a_job_that_is_parked_when_its_worker_dies_asks_once(judged: Served, tmp_path: Path) -> None:
    body = guided("scripted", best_of=3)
    before = judged.metric("scorer_requests_total", scorer="scripted")
    right = judged.post("/v1/completions", body).json()["choices"]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(judged.post, "/v1/completions", body | {"metadata": {"do": f"wait {tmp_path / 'there'}"}})
        wait_for(lambda: judged.metric("num_requests_parked") == 1)
        pid = re.findall(r"worker 0 \(process (\d+)\) is ready", judged.log.read_text("utf-8"))[-1]
        os.kill(int(pid), signal.SIGKILL)
        wait_for(lambda: judged.metric("worker_restarts_total") == 1)
        judged.wait_ready()
        wait_for(lambda: judged.metric("num_requests_parked") == 1)
        (tmp_path / "there").touch()
        assert waiting.result().json()["choices"] == right
    assert judged.metric("scorer_requests_total", scorer="scripted") == before + 2


# -- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scorer", "words"),
    [
        ({"name": "a"}, "target"),
        ({"name": "a", "target": "http://host"}, "target"),
        ({"name": "a", "target": "entrgi+http://user:secret@host"}, "target"),
        ({"name": "a", "target": "entrgi+file:///etc/passwd"}, "target"),
        ({"name": "a", "target": "python:module"}, "target"),
        ({"name": "a", "target": "entrgi+http://host:99999"}, "Port out of range"),
        ({"name": "a b", "target": "python:m:f"}, "name"),
        ({"name": "a", "target": "python:m:f", "retries": -1}, "retries"),
        ({"name": "a", "target": "python:m:f", "timeout_seconds": 0}, "timeout_seconds"),
        ({"name": "a", "target": "python:m:f", "timeout": 3}, "timeout"),
        ({"name": "a", "target": "python:m:f", "key_env": "K"}, "`key_env` has no effect with python"),
        ({"name": "a", "target": "tei-rerank+http://host", "model": "m"}, "`model` has no effect with tei-rerank"),
        ({"name": "a", "target": "vllm-classify+http://host"}, "`label`"),
        ({"name": "a", "target": "vllm-score+http://host", "label": 1}, "`label`"),
    ],
)
def test_a_scorer_that_cannot_be_is_refused_with_its_key(scorer: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=r"^scorers: ") as caught:
        load({"scorers": [json.dumps(scorer)]})
    assert words in str(caught.value)


def test_scorers_from_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text('scorers:\n- {name: a, target: "python:m:f"}\n- {name: b, target: "tei-rerank+https://h:1/p"}\n')
    assert [(each.name, each.kind, each.calls) for each in load({}, file).scorers] == [
        ("a", "python", 1),
        ("b", "tei-rerank", 8),
    ]
    monkeypatch.setenv("ENTRGI_SCORERS", json.dumps([LENGTHS]))
    assert load({}).scorers[0].timeout_seconds == 120
    with pytest.raises(SettingsError, match=r"^scorers: two of them are named length"):
        load({"scorers": [json.dumps(LENGTHS)] * 2})


@pytest.mark.parametrize("name", ["rm", "dlm"])
def test_a_scorer_with_the_name_of_a_model_stops_the_start(name: str) -> None:
    engine = ScriptedEngine(at_once)
    engine.scorers = {name: Scorer(function("length"))}
    with pytest.raises(ConfigurationError, match=f"^scorers: another model is named {name}"):
        make(engine).state.frontend.check_names()

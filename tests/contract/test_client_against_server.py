"""Both clients and the command line against a real server on a golden checkpoint: every shape as it really comes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from clients import (
    AsyncClient,
    BadRequest,
    CanvasFrame,
    ChoiceFinished,
    Client,
    Diffusion,
    Guidance,
    NotFound,
    Options,
    Summary,
    TextDelta,
    WeightedReward,
)
from clients.cli import main
from tests.support.serving import ROOT, Served

PROMPT = "Tell me a story."
OPTIONS: Options = {"max_tokens": 12, "seed": 7, "best_of": 2, "guidance": "entrgi", "diffusion": Diffusion(steps=6)}


@pytest.fixture
def client(server: Served) -> Iterator[Client]:
    with Client(server.url) as opened:
        yield opened


def test_completion_has_rewards_report_and_trace(client: Client) -> None:
    answer = client.complete(PROMPT, **OPTIONS, return_token_ids=True, ignore_eos=True, trace=True)
    (choice,), report = answer.choices, answer.guidance
    assert choice.token_ids is not None
    assert report is not None
    assert report.rewards is not None
    assert answer.usage.completion_tokens_details is not None
    assert answer.trace is not None
    assert len(choice.token_ids) == answer.usage.completion_tokens == 12
    assert choice.reward == max(reward for reward in report.rewards[0] if reward is not None)
    assert (report.method, report.seed, report.steps) == ("entrgi", 7, 6)
    assert answer.usage.completion_tokens_details["trajectory_tokens"] == 24
    assert [sum(step.revealed for step in trajectory) for trajectory in answer.trace[0]] == [12, 12]


def test_a_stream_says_what_the_whole_answer_says(client: Client) -> None:
    whole = client.complete(PROMPT, **OPTIONS)
    with client.stream_complete(PROMPT, canvas=True, **OPTIONS) as stream:
        events = list(stream)
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == whole.choices[0].text
    (finished,) = (e for e in events if isinstance(e, ChoiceFinished))
    assert finished.reward == whole.choices[0].reward
    assert finished.finish_reason == whole.choices[0].finish_reason
    summary = events[-1]
    assert isinstance(summary, Summary)
    assert summary.usage == whole.usage
    assert summary.guidance is not None
    assert whole.guidance is not None
    assert summary.guidance.rewards == whole.guidance.rewards
    frames = [e for e in events if isinstance(e, CanvasFrame)]
    assert {frame.trajectory for frame in frames} == {0, 1}
    for trajectory in (0, 1):
        masked = [f.tokens.count(None) for f in frames if f.trajectory == trajectory]
        assert masked == sorted(masked, reverse=True)
        assert masked[-1] == 0


async def test_the_asynchronous_client_gets_the_same_tokens(client: Client, server: Served) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    expected = client.chat(messages, **OPTIONS)
    async with AsyncClient(server.url) as asynchronous:
        answer = await asynchronous.chat(messages, **OPTIONS)
        async with await asynchronous.stream_chat(messages, **OPTIONS) as stream:
            text = "".join([event.text async for event in stream if isinstance(event, TextDelta)])
    assert answer.choices == expected.choices
    assert text == expected.choices[0].text


def test_weighted_rewards_scores_and_tokens(client: Client) -> None:
    weighted = Guidance("bon", reward_models=(WeightedReward("rm", 0.5),))
    answer = client.complete(PROMPT, max_tokens=6, seed=1, best_of=2, guidance=weighted)
    (choice,) = answer.choices
    score = client.score(PROMPT, [choice.text, "other"]).data[0].score
    assert choice.reward == pytest.approx(0.5 * score, abs=1e-4)
    ranked = client.rerank(PROMPT, ["one", "two", "three"], top_n=2).results
    assert ranked[0].relevance_score >= ranked[1].relevance_score
    assert client.detokenize(client.tokenize("a b c").tokens) == "a b c"


def test_errors(client: Client) -> None:
    with pytest.raises(BadRequest) as caught:
        client.complete(PROMPT, guidance=Guidance("entrgi", eta=11.0))
    assert caught.value.param == "guidance.eta"
    assert caught.value.request_id
    with pytest.raises(NotFound):
        client.complete(PROMPT, model="nobody")


Run = Callable[..., tuple[str, str]]


@pytest.fixture
def run(server: Served, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line's output and what it tells beside it."""

    def call(*arguments: str, status: int = 0) -> tuple[str, str]:
        assert main([*arguments, "--url", server.url]) == status
        out, told = capsys.readouterr()
        return out, " ".join(told.split())

    return call


def test_the_command_line_prints_the_text_alone_to_standard_output(run: Run) -> None:
    asked = ["complete", PROMPT, "--chat", *["--guidance", "entrgi", "--guidance-every", "2", "--best-of", "2"]]
    asked += ["--max-tokens", "8", "--seed", "3"]
    text, told = run(*asked)
    whole = json.loads(run(*asked, "--json")[0])
    (choice,) = whole["choices"]
    assert text == choice["text"] + "\n"
    assert f"[{choice['finish_reason']}, reward {choice['reward']:.3f}]" in told
    assert "entrgi, seed 3, 8 steps in" in told
    assert ", ".join(f"{reward:.2f}" for reward in whole["guidance"]["rewards"][0]) in told
    assert "not exact: guidance.every" in told
    for flag in ("--stream", "--canvas"):
        assert run(*asked, flag)[0] == text


def test_the_command_lines_other_commands(run: Run, client: Client) -> None:
    models = client.models()
    assert [(model.id, model.kind) for model in models] == [("dlm", "diffusion"), ("rm", "reward"), ("other", "reward")]
    assert all(model.id in run("models")[0] for model in models)
    assert [model["id"] for model in json.loads(run("models", "--json")[0])] == [model.id for model in models]
    scores = [entry.score for entry in client.score(PROMPT, ["Nice", "Bad"]).data]
    lines = run("score", PROMPT, "Nice", "Bad")[0].splitlines()
    assert [line.split() for line in lines] == [[f"{scores[0]:.4f}", "Nice"], [f"{scores[1]:.4f}", "Bad"]]
    assert "guidance.method" in run("complete", PROMPT, "--guidance", "nobody", status=1)[1]
    load = "--rate 50 --requests 8 --max-tokens 4 --stream --guidance entrgi"
    report = json.loads(run("loadgen", *load.split())[0].splitlines()[-1])
    assert report["outcomes"] == {"ok": 8}
    assert set(report["latencies"]) == {"latency", "first text", "queue", "step", "late departure"}


def test_the_command_line_as_a_process(server: Served) -> None:
    command = [sys.executable, "-m", "clients", "complete", PROMPT, "--max-tokens", "4", "--url", server.url]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr

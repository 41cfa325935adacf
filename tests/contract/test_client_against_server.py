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
def url(server: Served) -> str:
    return server.url


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url) as opened:
        yield opened


def test_models(client: Client) -> None:
    served_models = client.models()
    assert [model.kind for model in served_models] == ["diffusion", "reward", "reward"]
    assert served_models[1].id == "rm"


def test_completion_has_rewards_report_and_trace(client: Client) -> None:
    whole: Options = {**OPTIONS, "return_token_ids": True, "ignore_eos": True, "trace": True}
    answer = client.complete(PROMPT, **whole)
    (choice,) = answer.choices
    assert choice.token_ids is not None
    assert len(choice.token_ids) == 12
    assert answer.guidance is not None
    assert answer.guidance.rewards is not None
    assert choice.reward == max(r for r in answer.guidance.rewards[0] if r is not None)
    assert (answer.guidance.method, answer.guidance.seed, answer.guidance.steps) == ("entrgi", 7, 6)
    assert answer.usage.completion_tokens == 12
    assert answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details["trajectory_tokens"] == 24
    assert answer.trace is not None
    (trajectories,) = answer.trace
    assert len(trajectories) == 2
    assert sum(step.revealed for step in trajectories[0]) == 12


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


async def test_the_asynchronous_client_gets_the_same_tokens(client: Client, url: str) -> None:
    expected = client.chat([{"role": "user", "content": PROMPT}], **OPTIONS)
    async with AsyncClient(url) as asynchronous:
        answer = await asynchronous.chat([{"role": "user", "content": PROMPT}], **OPTIONS)
        async with await asynchronous.stream_chat([{"role": "user", "content": PROMPT}], **OPTIONS) as stream:
            text = "".join([event.text async for event in stream if isinstance(event, TextDelta)])
    assert answer.choices == expected.choices
    assert text == expected.choices[0].text


def test_a_left_stream_frees_the_server(client: Client) -> None:
    with client.stream_complete(PROMPT, canvas=True, **OPTIONS) as stream:
        assert isinstance(next(iter(stream)), CanvasFrame)
    assert client.complete(PROMPT, max_tokens=4).choices[0].reward is None


def test_weighted_rewards_scores_and_tokens(client: Client) -> None:
    weighted = Guidance("bon", reward_models=(WeightedReward("rm", 0.5),))
    answer = client.complete(PROMPT, max_tokens=6, seed=1, best_of=2, guidance=weighted)
    (choice,) = answer.choices
    score = client.score(PROMPT, [choice.text, "other"]).data[0].score
    assert choice.reward == pytest.approx(0.5 * score, abs=1e-4)
    ranked = client.rerank(PROMPT, ["one", "two", "three"], top_n=2).results
    assert ranked[0].relevance_score >= ranked[1].relevance_score
    tokens = client.tokenize("a b c").tokens
    assert client.detokenize(tokens) == "a b c"


def test_errors(client: Client) -> None:
    with pytest.raises(BadRequest) as caught:
        client.complete(PROMPT, guidance=Guidance("entrgi", eta=11.0))
    assert caught.value.param == "guidance.eta"
    assert caught.value.request_id
    with pytest.raises(NotFound):
        client.complete(PROMPT, model="nobody")


@pytest.fixture
def run(url: str, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """The command line's output and what it tells beside it."""

    def call(*arguments: str, status: int = 0) -> tuple[str, str]:
        assert main([*arguments, "--url", url]) == status
        out, told = capsys.readouterr()
        return out, " ".join(told.split())

    return call


def test_the_command_line_prints_the_text_alone_to_standard_output(run: Callable[..., tuple[str, str]]) -> None:
    asked = ["complete", PROMPT, "--guidance", "entrgi", "--best-of", "2", "--max-tokens", "8", "--seed", "3"]
    asked += ["--guidance-every", "2", "--chat"]
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


def test_the_command_lines_other_commands(run: Callable[..., tuple[str, str]], client: Client) -> None:
    listed = run("models")[0]
    assert all(model.id in listed for model in client.models())
    assert [model["id"] for model in json.loads(run("models", "--json")[0])] == ["dlm", "rm", "other"]
    scores = [entry.score for entry in client.score(PROMPT, ["Nice", "Bad"]).data]
    lines = run("score", PROMPT, "Nice", "Bad")[0].splitlines()
    assert [line.split() for line in lines] == [[f"{scores[0]:.4f}", "Nice"], [f"{scores[1]:.4f}", "Bad"]]
    assert "guidance.method" in run("complete", PROMPT, "--guidance", "nobody", status=1)[1]
    report = json.loads(
        run("loadgen", "--rate", "50", "--requests", "8", "--max-tokens", "4", "--stream", "--guidance", "entrgi")[
            0
        ].splitlines()[-1]
    )
    assert report["outcomes"] == {"ok": 8}
    assert set(report["latencies"]) == {"latency", "first text", "queue", "step", "late departure"}


def test_the_command_line_as_a_process(url: str) -> None:
    command = [sys.executable, "-m", "clients", "complete", PROMPT, "--max-tokens", "4", "--url", url]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr

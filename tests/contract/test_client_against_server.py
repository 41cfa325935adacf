"""Both clients and the command line against a real server on a golden checkpoint: every shape as it really comes."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

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
from clients.terminal import printable
from server import __version__
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
    for flag in ("--stream", "--canvas", "--trace"):
        assert run(*asked, flag)[0] == text
    assert "trajectory 1" in run(*asked, "--trace")[1]
    traced = json.loads(run(*asked, "--trace", "--json")[0])["trace"]
    assert [len(steps) for steps in traced[0]] == [8, 8]


def test_the_command_lines_other_commands(run: Run, client: Client, tmp_path: Path) -> None:
    models = client.models()
    assert [(model.id, model.kind) for model in models] == [("dlm", "diffusion"), ("rm", "reward"), ("other", "reward")]
    assert all(model.id in run("models")[0] for model in models)
    assert [model["id"] for model in json.loads(run("models", "--json")[0])] == [model.id for model in models]
    scores = [entry.score for entry in client.score(PROMPT, ["Nice", "Bad"]).data]
    lines = run("score", PROMPT, "Nice", "Bad")[0].splitlines()
    told = [[f"{scores[0]:.4f}", "Nice"], [f"{scores[1]:.4f}", "Bad"]]
    assert [line.split() for line in lines] == told
    assert [entry["score"] for entry in json.loads(run("score", PROMPT, "Nice", "Bad", "--json")[0])["data"]] == scores
    best = max(told, key=lambda line: float(line[0]))
    assert run("rerank", PROMPT, "Nice", "Bad", "--top-n", "1")[0].split() == best
    (first,) = json.loads(run("rerank", PROMPT, "Nice", "Bad", "--top-n", "1", "--json")[0])["results"]
    assert (first["index"], first["relevance_score"]) == (scores.index(max(scores)), max(scores))
    assert "guidance.method" in run("complete", PROMPT, "--guidance", "nobody", status=1)[1]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Hotel?"}\n{"messages": [{"role": "user", "content": "Phone?"}]}\n')
    load = f"--rate 50 --requests 8 --max-tokens 4 --stream --guidance entrgi --prompts {prompts}"
    report = json.loads(run("loadgen", *load.split())[0].splitlines()[-1])
    assert report["outcomes"] == {"ok": 8}
    assert set(report["latencies"]) == {"latency", "first text", "queue", "step", "late departure"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The client's wheel, built from a copy of its folder without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "clients", folder / "clients", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    offline = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    command = [sys.executable, "-m", "pip", "wheel", *offline, "-w", str(folder), str(folder / "clients")]
    subprocess.run(command, check=True, timeout=120)
    (made,) = folder.glob("*.whl")
    return made


def test_the_wheel_holds_the_client_alone_and_names_what_it_imports(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (about,) = (archive.read(name).decode() for name in names if name.endswith("/METADATA"))
        code = [archive.read(name) for name in names if name.endswith(".py")]
    assert {name.partition("/")[0] for name in names} == {"entrgi_client", f"entrgi_client-{__version__}.dist-info"}
    assert f"\nVersion: {__version__}\n" in about
    nodes = [node for text in code for node in ast.walk(ast.parse(text))]
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    others = {name.partition(".")[0] for name in imported} - sys.stdlib_module_names
    assert others == set(re.findall(r"^Requires-Dist: ([\w-]+)", about, re.MULTILINE))


def test_the_installed_command_works_from_any_folder(wheel: Path, server: Served, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv/bin/python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True, timeout=120)
    asked = ["complete", "-", "--max-tokens", "4", "--seed", "3", "--url", server.url]
    environment = {"PYTHONPATH": sysconfig.get_path("purelib")}  # what the wheel requires is there
    done = subprocess.run(
        [str(python.with_name("entrgi")), *asked],
        cwd=tmp_path, env=environment, input=PROMPT + "\n", capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with Client(server.url) as client:
        assert done.stdout == printable(client.complete(PROMPT, max_tokens=4, seed=3).choices[0].text) + "\n"

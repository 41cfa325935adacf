"""`compare`, `eval`, `sample` and `batch` against a real server on a golden checkpoint, as a user gives them."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from clients import Client, Guidance
from clients.cli import main
from tests.support.serving import ROOT, Served

SMALL = ["--max-tokens", "6", "--steps", "3", "--limit", "3"]
EXAMPLES = ROOT / "demo" / "benchmarks"
Run = Callable[..., tuple[str, str]]


@pytest.fixture
def run(server: Served, capsys: pytest.CaptureFixture[str]) -> Run:
    """Standard output and error of a command against the server."""

    def call(*arguments: str, status: int = 0) -> tuple[str, str]:
        assert main([*arguments, "--url", server.url]) == status
        return capsys.readouterr()

    return call


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f'{{"prompt": "Hotel {number}?"}}\n' for number in range(4)))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


class Page(HTMLParser):
    """What a page loads from elsewhere, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [
            value or "" for name, value in attrs if name in ("src", "srcset") or (tag == "link" and name == "href")
        ]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_compare_measures_a_sweep_and_asks_only_what_is_new(run: Run, prompts: Path, tmp_path: Path) -> None:
    out, report, dpo = tmp_path / "runs.jsonl", tmp_path / "report", tmp_path / "pairs.jsonl"
    command = ["compare", "--prompts", str(prompts), "--method", "bon", "--method", "entrgi", "--best-of", "1,2"]
    command += [*SMALL, "--out", str(out), "--held-out", "other"]
    (first,) = json.loads(run(*command)[0].splitlines()[-1])
    settings = first["settings"]
    assert list(settings) == ["bon K=1", "bon K=2", "entrgi K=1", "entrgi K=2"]
    assert (first["baseline"], first["reward_model"]) == ("bon K=1", "rm")
    journal = lines(out)
    generations = [line for line in journal if line["request"]["url"] == "/v1/chat/completions"]
    assert len(generations) == 3 * 4
    assert {line["request"]["url"] for line in journal} == {"/v1/chat/completions", "/v1/score"}
    best = [
        line["response"]["body"]["choices"][0]["reward"] for line in generations
        if line["request"]["body"]["guidance"]["method"] == "bon" and line["request"]["body"]["best_of"] == 2
    ]  # fmt: skip
    assert settings["bon K=2"]["measures"]["Top@1"]["mean"] == pytest.approx(sum(best) / 3)
    assert settings["bon K=2"]["measures"]["GFLOPs"]["mean"] > settings["bon K=1"]["measures"]["GFLOPs"]["mean"] > 0
    assert "other Avg@N" in settings["entrgi K=2"]["measures"]

    (second,) = json.loads(
        run(*command, "--method", "none", "--report", str(report), "--pairs", str(dpo))[0].splitlines()[-1]
    )
    assert lines(out)[: len(journal)] == journal
    new = [line for line in lines(out)[len(journal) :] if line["request"]["url"] == "/v1/chat/completions"]
    assert {line["request"]["body"]["guidance"]["method"] for line in new} == {"none"}
    assert len(new) == 3 * 2
    assert {name: second["settings"][name]["measures"] for name in settings} == {
        name: found["measures"] for name, found in settings.items()
    }
    for pair in lines(dpo):
        assert pair["score_chosen"] > pair["score_rejected"]
        assert pair["prompt"][0]["content"].startswith("Hotel")
    page = Page((report / "report.html").read_text("utf-8"))
    assert page.loads == []
    assert "entrgi K=2" in page.text
    for plot in report.glob("*.svg"):
        assert ElementTree.parse(plot).getroot().tag.endswith("svg")
        assert plot.name in (report / "report.md").read_text("utf-8")

    told, *_ = run(*command, "--method", "bon@500")  # more than a server takes
    assert json.loads(told.splitlines()[-1])[0]["unanswered"] == {"bon K=500": 3}
    assert "bon K=500 3" in told


@pytest.mark.slow
def test_eval_reads_the_three_benchmarks_and_a_judge(run: Run, server: Served, tmp_path: Path) -> None:
    out, report = tmp_path / "runs.jsonl", tmp_path / "report"
    data = [f"{path.stem}={path}" for path in sorted(EXAMPLES.glob("*.json*"))]
    command = ["eval", *data, *SMALL[:-1], "2", "--method", "bon@1,2", "--method", "entrgi@2", "--curves", "1"]
    command += ["--out", str(out), "--report", str(report), "--judge-url", server.url]
    told = json.loads(run(*command)[0].splitlines()[-1])
    assert [each["prompts"] for each in told] == ["JudgeBench", "RewardBench-2", "RM-Bench"]
    assert all(len(each["settings"]["entrgi K=2"]["reward_over_steps"]) == 3 for each in told)
    shown = {
        (body["messages"][-1]["content"], line["response"]["body"]["choices"][0]["message"]["content"])
        for line in lines(out)
        if "guidance" in (body := line["request"]["body"]) and not body.get("trace")
    }
    unit_test = "Unit Test: Does the response correctly and helpfully answer the query?"
    judged = {
        line["request"]["body"]["messages"][0]["content"]
        for line in lines(out)
        if "guidance" not in line["request"]["body"]
    }
    assert judged == {f"Query: {query}\n\nResponse: {text}\n\n{unit_test}" for query, text in shown}
    markdown = (report / "report.md").read_text("utf-8")
    names = {path.name for path in report.iterdir()}
    assert {"reward-against-compute-0.svg", "rewards-1.svg", "reward-over-steps-2.svg"} <= names
    wanted = ("JudgeBench, rewards by rm: answers side by side", "review of a hotel.", "reward-over-steps-2.svg")
    for part in (*wanted, "| Factuality | 1 |", "| Precise IF | 1 |"):
        assert part in markdown


def test_samples_are_what_the_server_gives_for_their_seeds(
    run: Run, server: Served, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "data.parquet"
    command = ["sample", "--prompts", str(prompts), *SMALL, "--best-of", "2", "--keep", "2", "--seeds", "5,50"]
    told = run(*command, "--out", str(out), "--pairs", str(tmp_path / "pairs.parquet"))[1]
    assert f"12 rows in {out}" in told
    rows = parquet.read_table(out).to_pylist()
    assert {(row["prompt_id"], row["seed"]) for row in rows} == {
        (str(i), i + seed) for i in range(3) for seed in (5, 50)
    }
    (row,) = (row for row in rows if row["seed"] == 51 and row["reward"] == max(row["rewards"]))
    guidance = Guidance("entrgi", reward_model="rm")
    asked = {**json.loads(row["settings"]), "guidance": guidance, "return_token_ids": True, "return_step_map": True}
    with Client(server.url) as client:
        (best, _) = client.chat(row["prompt"], seed=51, extra={"diffusion": asked.pop("diffusion")}, **asked).choices
    assert row["completion"] == [{"role": "assistant", "content": best.text}]
    assert (row["token_ids"], row["step_map"]) == (best.token_ids, best.step_map)


def test_shards_are_the_whole_and_a_preset_gives_way_to_a_flag(run: Run, prompts: Path, tmp_path: Path) -> None:
    command = ["sample", "--prompts", str(prompts), "--max-tokens", "4", "--rgrl", "--steps", "2"]
    command += ["--text-only", "--raw"]
    whole = run(*command, "--out", str(tmp_path / "whole.jsonl")) and lines(tmp_path / "whole.jsonl")
    parts: list[dict[str, Any]] = []
    for index in range(3):
        run(*command, "--out", str(tmp_path / "part.jsonl"), "--shard", f"{index}/3")
        parts += lines(tmp_path / "part.jsonl")
    key = "prompt_id"
    assert sorted(parts, key=lambda row: row[key]) == sorted(whole, key=lambda row: row[key])
    settings = json.loads(whole[0]["settings"])
    assert (settings["best_of"], settings["temperature"], settings["diffusion"]) == (4, 0.9, {"steps": 2})
    assert settings["guidance"] == {"method": "entrgi", "reward_model": "rm", "eta": 0.5, "gradient_steps": 1}
    assert whole[0]["token_ids"] is None
    assert isinstance(whole[0]["completion"], str)


def test_a_batch_is_answered_line_by_line(run: Run, tmp_path: Path) -> None:
    bodies = [
        ("/v1/completions", {"prompt": "Hotel?", "max_tokens": 4, "seed": 1}),
        ("/v1/completions", {"prompt": "Hotel?", "max_tokens": -4}),
        ("/v1/score", {"queries": "Hotel?", "documents": ["Nice."]}),
    ]
    sent = [
        {"custom_id": name, "method": "POST", "url": url, "body": body}
        for name, (url, body) in zip("abc", bodies, strict=True)
    ]
    asked, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked.write_text("".join(f"{json.dumps(line)}\n" for line in sent))
    assert "3 answers in" in run("batch", str(asked), str(out), status=1)[1]
    found = {line["custom_id"]: line["response"] for line in lines(out)}
    assert {name: response["status_code"] for name, response in found.items()} == {"a": 200, "b": 400, "c": 200}
    assert found["b"]["body"]["error"]["param"] == "max_tokens"
    assert found["a"]["request_id"]
    before = out.read_bytes()
    run("batch", str(asked), str(out), status=1)
    assert out.read_bytes() == before

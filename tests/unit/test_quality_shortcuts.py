"""The measurement of inexact options: what is asked for, costs paired by prompt, gains by round, and the reports."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import httpx
import pytest
from scipy import stats

from clients.quality.fluency import Verdict
from clients.quality.prompts import Prompt
from clients.quality.requests import Answer
from clients.quality.shortcuts import EXACT, Option, Run, Settings, ask_all, options, rows_of
from clients.quality.shortcuts_report import shortcuts_json, shortcuts_text, write
from server.api.fields import ChatCompletionRequest

PROMPTS = [Prompt(f"Review hotel {number}.", "hotel") for number in range(10)]


@pytest.mark.parametrize("option", options(48), ids=lambda option: option.name)
def test_every_option_is_a_valid_request(option: Option) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], **option.body(Settings(steps=48), "sentiment")}
    request = ChatCompletionRequest.model_validate_json(json.dumps(body))
    assert request.guidance is not None
    assert request.guidance.method == option.method


def test_one_field_at_a_time_differs_from_the_exact_run() -> None:
    exact = options(48)[0].body(Settings(steps=48), "sentiment")
    assert exact["guidance"] == {"method": "entrgi", "reward_model": "sentiment"}
    halved = next(option for option in options(48) if option.name == "steps / 2").body(Settings(steps=48), "sentiment")
    assert halved == {**exact, "diffusion": {"steps": 24}}


async def test_prompts_keep_their_seeds_and_every_option_sees_all_of_them() -> None:
    seen: list[tuple[str, str, int]] = []

    def serve(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        algorithm = body["diffusion"].get("algorithm", "entropy")
        seen.append((algorithm, body["messages"][0]["content"], body["seed"]))
        report = {"rewards": [[1.5, 0.5]], "steps": 7, "model_calls": 6, "reward_calls": 18, "approximations": ["x"]}
        choice = {"finish_reason": "stop", "reward": 1.5, "message": {"content": "Fine."}}
        return httpx.Response(200, json={"choices": [choice], "guidance": report})

    chosen = [Option(EXACT, "reference"), Option("threshold", "threshold", diffusion={"algorithm": "threshold"})]
    async with httpx.AsyncClient(transport=httpx.MockTransport(serve), base_url="http://server") as client:
        runs = await ask_all(client, PROMPTS, chosen, "sentiment", Settings(seed=100))
    for algorithm, run in zip(("entropy", "threshold"), runs, strict=True):
        asked = [(text, seed) for name, text, seed in seen if name == algorithm][-len(PROMPTS) :]
        assert sorted(asked) == [(prompt.text, 100 + index) for index, prompt in enumerate(PROMPTS)]
        assert [answer.prompt for answer in run.answers] == PROMPTS
        assert len(run.seconds) == 2  # rounds of 8 prompts
    first = runs[0].answers[0]
    assert (first.steps, first.model_calls, first.reward_calls, first.approximations) == (7, 6, 18, ("x",))


def made(name: str, rewards: list[float], seconds: list[float], steps: int) -> Run:
    answers = [
        Answer(prompt, ("Fine.",), ("stop",), (reward,), (reward, reward - 1.0), steps, steps, 3 * steps)
        for prompt, reward in zip(PROMPTS, rewards, strict=False)
    ]
    return Run(Option(name, "reference"), answers, seconds)


def verdicts(nlls: list[float]) -> list[Verdict]:
    return [Verdict(PROMPTS[0], "Fine.", nll, () if nll < 3 else ("unlikely English",)) for nll in nlls]


def test_costs_are_paired_by_prompt_and_gains_by_round() -> None:
    exact = made(EXACT, [0.0, 4.0, -3.0, 1.0, 2.5, 0.7], [10.0, 40.0, 20.0], 48)
    quick = made("quick", [-0.1, 3.7, -3.2, 0.9, 2.1, 0.6], [5.0, 22.0, 9.0], 12)
    judged = [verdicts([2.0, 2.5, 1.0, 2.2, 2.0, 2.0]), verdicts([2.1, 2.4, 1.3, 2.2, 3.0, math.inf])]
    same, row = rows_of([exact, quick], judged)
    differences = [b.choice_rewards[0] - a.choice_rewards[0] for a, b in zip(exact.answers, quick.answers, strict=True)]  # type: ignore[operator]
    low, high = stats.t.interval(0.95, 5, loc=sum(differences) / 6, scale=stats.sem(differences))
    assert (row.top_change.low, row.top_change.high) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))
    assert row.average.mean == pytest.approx(row.top.mean - 0.5)
    assert row.time[0] == pytest.approx(stats.gmean([0.5, 0.55, 0.45]))
    assert row.time[1] < 0.45 < row.time[0] < 0.55 < row.time[2]
    assert (row.steps, row.model_calls, row.reward_calls) == (12, 12, 36)
    assert row.nll_change.mean == pytest.approx((0.1 - 0.1 + 0.3 + 0.0 + 1.0) / 5)  # the empty answer has none
    assert row.fluent[0] == pytest.approx(4 / 6)
    assert (same.top_change.mean, same.top_change.half, same.time) == (0.0, 0.0, (1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="exact"):
        rows_of([quick], judged[1:])


def test_reports_hold_every_option(tmp_path: Path) -> None:
    runs = [made(option.name, [1.0, 2.0, 0.5], [1.0, 2.0], 4) for option in options(48)]
    rows = rows_of(runs, [verdicts([2.0, 2.5, 4.0])] * len(runs))
    write(tmp_path, "sentiment", rows)
    document = json.loads((tmp_path / "shortcuts-sentiment.json").read_text("utf-8"))
    assert document == shortcuts_json("sentiment", rows)
    assert [row["option"] for row in document["rows"]] == [option.name for option in options(48)]
    markdown, table = (tmp_path / "shortcuts-sentiment.md").read_text("utf-8"), shortcuts_text("sentiment", rows)
    for option in options(48):
        assert f"| {option.name} |" in markdown
        assert option.name in table
    assert ElementTree.parse(tmp_path / "shortcuts-sentiment.svg").getroot().tag.endswith("svg")

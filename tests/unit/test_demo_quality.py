"""The quality client: intervals against scipy, what counts as a fault, requests as the contract wants them, reports."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from scipy import stats

from clients.quality import prompts as prompt_file
from clients.quality import report as write
from clients.quality.fluency import Calibration, FluencyReport, Verdict, form_faults, subject_faults
from clients.quality.intervals import Interval, share_interval
from clients.quality.journal import pairs_by_setting
from clients.quality.prompts import Prompt
from clients.quality.requests import Answer, ServerError, ask
from clients.quality.shortcuts import Settings
from clients.runs.journal import Record, Response, request
from demo.prompts import build


def test_intervals_agree_with_scipys():
    values = [0.3, -1.2, 2.2, 0.9, 1.7, -0.4, 0.0, 1.1]
    found = Interval.of(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=found.mean, scale=stats.sem(values))
    assert (found.low, found.high) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))
    wilson = stats.binomtest(183, 200).proportion_ci(method="wilson")
    assert share_interval(183, 200) == pytest.approx((0.915, wilson.low, wilson.high), abs=1e-6)
    with pytest.raises(ValueError, match="at least one"):
        Interval.of([])


def test_the_prompts_on_disk_are_those_of_the_corpus():
    assert json.loads(prompt_file.PATH.read_text("utf-8")) == build()
    assert "rooms" in prompt_file.load().subjects["hotel"]


SUBJECTS = {"hotel": ("hotel", "rooms", "pool"), "phone": ("camera", "phone"), "camera": ("camera", "lens")}


@pytest.mark.parametrize(
    ("text", "subject", "expected"),
    [
        ("Hotels like this are rare.", "hotel", []),
        ("It was lovely.", "hotel", ["not on the subject"]),
        ("The hotel was nice and the lens sharp.", "hotel", []),
        ("The hotel beats any phone.", "hotel", ["names another subject (phone)"]),
        ("The camera was great.", "phone", []),
        ("The swimming pools were fine.", "hotel", []),
        ("The whirlpool was fine.", "hotel", ["not on the subject"]),
    ],
)
def test_what_counts_as_on_the_subject(text, subject, expected):
    assert subject_faults(text, subject, SUBJECTS) == expected


def test_what_counts_as_a_fault_of_form():
    assert form_faults("I loved the hotel.", "stop") == []
    assert form_faults("What a hotel it was!", "stop") == []
    assert form_faults("I loved the hotel.", "length") == ["does not end"]
    assert form_faults("I loved the", "stop") == ["no final punctuation", "too short"]
    assert form_faults("I loved the the hotel.", "stop") == ["repeats a word"]
    assert form_faults("", "stop") == ["no final punctuation", "too short"]


async def test_requests_follow_the_contract_and_keep_their_order():
    sent: list[tuple[str, dict]] = []

    def serve(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        sent.append((request.url.path, body))
        chat = "messages" in body
        text = body["messages"][0]["content"] if chat else body["prompt"]
        answer = {"message": {"role": "assistant", "content": text}, "reward": 1.5} if chat else {"text": text}
        whole = {"choices": [{"index": 0, "finish_reason": "stop", **answer}]}
        return httpx.Response(200, json=whole | ({"guidance": {"rewards": [[1.5, 0.5]]}} if chat else {}))

    prompts = [Prompt("Review the hotel.", "hotel"), Prompt("Review the phone.", "phone", form="raw")]
    options = Settings(max_tokens=40, steps=20, eta=0.4).options("entrgi", "sentiment")
    async with httpx.AsyncClient(transport=httpx.MockTransport(serve), base_url="http://server") as client:
        answers = await ask(client, prompts, options, seed=7, concurrency=2)
    assert answers[0] == Answer(prompts[0], ("Review the hotel.",), ("stop",), (1.5,), (1.5, 0.5))
    assert answers[1] == Answer(prompts[1], ("Review the phone.",), ("stop",), (None,), ())
    bodies = dict(sent)
    common = {"max_tokens": 40, "n": 1, "best_of": 4, "diffusion": {"steps": 20}}
    common |= {"guidance": {"method": "entrgi", "reward_model": "sentiment", "eta": 0.4}}
    assert bodies["/v1/completions"] == {"prompt": "Review the phone.", "seed": 8, **common}
    assert bodies["/v1/chat/completions"]["seed"] == 7
    assert "eta" not in Settings(eta=0.4).options("bon", "sentiment")["guidance"]
    none = Settings().options("none", "sentiment")
    assert (none["n"], "best_of" in none) == (4, False)


async def test_a_refusal_is_an_error_with_the_servers_words():
    refuse = httpx.MockTransport(lambda _: httpx.Response(400, json={"error": {"message": "no such reward model"}}))
    async with httpx.AsyncClient(transport=refuse, base_url="http://server") as client:
        with pytest.raises(ServerError, match=r"400.*no such reward model"):
            await ask(client, [Prompt("Review the hotel.", "hotel")], {}, seed=1, concurrency=1)


def test_a_journals_answers_are_judged_by_setting() -> None:
    def record(seed: int, text: str, status: int = 200, **fields: Any) -> Record:
        question = [{"role": "user", "content": f"Review {seed}."}]
        body = {"model": "dlm", "messages": question, "guidance": {"method": "bon"}, "n": 2, "seed": seed, **fields}
        answer = {"id": "a", "model": "dlm", "choices": [{"index": 0, "message": {"content": text}}]}
        asked = request("/v1/chat/completions", body)
        return Record("a", asked.custom_id, Response(status, answer), asked, "http://server", 1.0)

    kept = [record(1, "Nice."), record(2, "Good."), record(2, "Good.", best_of=4), record(3, "No.", 400)]
    found = pairs_by_setting([*kept, record(1, "Nice.", trace=True)])
    assert [*found.values()] == [[("Review 1.", "Nice."), ("Review 2.", "Good.")], [("Review 2.", "Good.")]]
    assert list(found)[1] == '{"best_of": 4, "guidance": {"method": "bon"}}'


def test_the_fluency_report_counts_by_split_and_form():
    def verdict(form: str, split: str, *faults: str) -> Verdict:
        return Verdict(Prompt("Review the hotel.", "hotel", form, split), "The hotel was nice.", 2.0, faults)

    verdicts = (verdict("chat", "train"), verdict("chat", "held-out wording", "does not end"), verdict("raw", "train"))
    report = FluencyReport(verdicts, Calibration(4.0, 0.975, 0.1))
    assert report.share()[0] == pytest.approx(2 / 3)
    assert report.share("held-out wording")[0] == 0.0
    assert report.share(form="raw")[0] == 1.0
    assert "does not end" in write.fluency_text(FluencyReport(verdicts[:2], report.calibration), 2)
    assert write.fluency_json(report)["by_split"]["train"][0] == 1.0

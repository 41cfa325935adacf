"""What a sweep asks, where prompts come from, what is made of the answers: grids, tables, data sets, statistics."""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from scipy import stats

from clients.arguments import Parser
from clients.cli import main
from clients.errors import ClientError
from clients.runs import samples, sweep
from clients.runs.answers import by_prompt, completion_of, distinct, read
from clients.runs.journal import Record, Response
from clients.runs.judge import Judge
from clients.runs.rows import PAIRS, SAMPLES, pairs, write_rows
from clients.runs.rows import samples as sample_rows
from clients.runs.sources import BENCHMARKS, Prompt, load
from clients.runs.statistics import differences, interval
from clients.types import Model
from tests.support.serving import ROOT

DETAILS = {"max_tokens": 8, "reward_model": "rm", "best_of": {"none": 1, "bon": 4}}
SERVED = [
    Model("dlm", {"type": "diffusion", "parameters": 1000, "defaults": DETAILS}),
    Model("rm", {"type": "reward", "parameters": 100}),
]
EXAMPLES = ROOT / "demo" / "benchmarks"


def parsed(arguments: str) -> argparse.Namespace:
    parser = Parser()
    sweep.add_arguments(parser)
    return parser.parse_args(arguments.split())


def grid(arguments: str, *methods: str) -> dict[str, Any]:
    return {setting.name: setting.fields for setting in sweep.settings_of(parsed(arguments), methods, SERVED)}


def test_a_sweep_is_all_combinations_that_a_method_has() -> None:
    found = grid("--eta 0.1,0.5 --best-of 1,4 --steps 16", "bon", "entrgi", "none")
    assert list(found) == [
        "bon K=1", "bon K=4", "entrgi K=1 eta=0.1", "entrgi K=1 eta=0.5", "entrgi K=4 eta=0.1", "entrgi K=4 eta=0.5",
        "none K=1", "none K=4",
    ]  # fmt: skip
    shared = {"model": "dlm", "best_of": 4, "n": 4, "diffusion": {"steps": 16}}
    assert found["entrgi K=4 eta=0.1"] == {**shared, "guidance": {"method": "entrgi", "reward_model": "rm", "eta": 0.1}}
    assert found["bon K=4"] == {**shared, "guidance": {"method": "bon", "reward_model": "rm"}}


def test_rewards_with_a_gradient_come_first() -> None:
    served = [Model("dlm", {"defaults": {**DETAILS, "reward_model": "mood"}}), Model("mood", {"type": "scorer"})]
    for models, reward in ((served, "mood"), ([*served, SERVED[1]], "rm")):
        (setting,) = sweep.settings_of(parsed(""), ["entrgi"], models)
        assert setting.reward_model == reward


def test_methods_may_have_a_k_of_their_own_and_settings_of_one_series_differ_in_it_alone() -> None:
    settings = sweep.settings_of(parsed("--reward-model rm,other"), ["bon@4,8", "entrgi"], SERVED)
    assert [setting.series for setting in settings[:4]] == ["bon by=rm", "bon by=other"] * 2
    assert [setting.best_of for setting in settings] == [4, 4, 8, 8, 4, 4]
    with pytest.raises(ClientError, match="'bon@many': after @ numbers are wanted"):
        grid("", "bon@many")
    with pytest.raises(ClientError, match="no reward model"):
        sweep.settings_of(parsed(""), ["bon"], [Model("dlm", {"defaults": {**DETAILS, "reward_model": None}})])


def test_methods_that_resample_have_settings_of_their_own() -> None:
    found = grid("--resample-strength 1,4 --resample-every 2 --eta 0.5", "bon", "smc@8", "entrgi+smc")
    assert list(found) == [
        "bon K=4", "smc K=8 strength=1.0", "smc K=8 strength=4.0", "entrgi+smc K=4 strength=1.0",
        "entrgi+smc K=4 strength=4.0",
    ]  # fmt: skip
    resample = {"every": 2, "strength": 4.0}
    assert found["smc K=8 strength=4.0"]["guidance"] == {"method": "bon", "reward_model": "rm", "resample": resample}
    guided = {"method": "entrgi", "reward_model": "rm", "eta": 0.5, "resample": resample}
    assert found["entrgi+smc K=4 strength=4.0"]["guidance"] == guided
    assert list(grid("--best-of 1,4", "bon", "smc")) == ["bon K=1", "bon K=4", "smc K=4"]
    with pytest.raises(ClientError, match="at least two trajectories"):
        grid("", "smc@1")
    by = grid("--resample-by reward,confidence --resample-potential max", "smc")
    assert [fields["guidance"]["resample"] for fields in by.values()] == [
        {"by": "reward", "potential": "max"},
        {"by": "confidence"},
    ]
    methods = ["bon", "smc", "entrgi+smc"]
    assert [setting.method for setting in sweep.settings_of(parsed(""), methods, SERVED)] == methods


def test_a_prompts_seed_is_its_own_whatever_else_is_asked() -> None:
    prompts = [Prompt(str(number), f"Question {number}?") for number in range(3)]
    settings = sweep.settings_of(parsed(""), ["bon"], SERVED)
    whole = sweep.asked(enumerate(prompts), settings, (10, 20), raw=False)
    assert [each.seed for each in whole] == [10, 20, 11, 21, 12, 22]
    last = sweep.asked([(2, prompts[2])], settings, (10, 20), raw=False)
    assert [each.request for each in last] == [each.request for each in whole[4:]]
    two = sweep.settings_of(parsed(""), ["bon", "entrgi"], SERVED)
    methods = [each.setting.method for each in sweep.asked(enumerate(prompts), two, (0,), raw=False)]
    assert methods == ["bon"] * 3 + ["entrgi"] * 3
    raw = sweep.asked([(0, prompts[0])], settings, (0,), raw=True)[0].request
    assert (raw.url, raw.body["prompt"]) == ("/v1/completions", "Question 0?")
    with pytest.raises(ClientError, match=r"--raw .* prompt 7"):
        sweep.asked([(0, Prompt("7", [{"role": "user", "content": "Hi"}]))], settings, (0,), raw=True)


@pytest.mark.parametrize(("name", "file"), [(name, next(EXAMPLES.glob(f"{name}.*"))) for name in BENCHMARKS])
@pytest.mark.parametrize("kind", ["as published", "parquet", "csv"])
def test_published_benchmarks_are_read_in_each_form(name: str, file: Path, kind: str, tmp_path: Path) -> None:
    text = file.read_text("utf-8")
    rows = json.loads(text) if file.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    if kind == "parquet":
        file = tmp_path / "table.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif kind == "csv":
        file = tmp_path / "table.csv"
        with file.open("w", newline="") as written:
            table = csv.DictWriter(written, rows[0].keys())
            table.writeheader()
            table.writerows(rows)
    prompts = load(f"{name}={file}")
    benchmark = BENCHMARKS[name]
    assert [prompt.text for prompt in prompts] == list(dict.fromkeys(row[benchmark.prompt] for row in rows))
    assert {prompt.subset for prompt in prompts} == {row[benchmark.subset] for row in rows}
    assert len(prompts) == 8


def test_a_table_of_ones_own_and_what_is_wrong_with_others(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hotel?"}]
    (tmp_path / "own.json").write_text(json.dumps([{"id": 7, "prompt": "Phone?"}, {"messages": turns}]))
    assert load(str(tmp_path / "own.json")) == [Prompt("7", "Phone?"), Prompt("1", turns)]
    (tmp_path / "other.json").write_text('[{"text": "Hotel?"}]')
    with pytest.raises(ClientError, match=r"other\.json, row 0: .*`prompt` or `messages`.*text"):
        load(str(tmp_path / "other.json"))
    with pytest.raises(ClientError, match=r"row 0: of the columns of RM-Bench it lacks domain, id, prompt"):
        load(f"rmbench={tmp_path / 'other.json'}")
    (tmp_path / "broken.parquet").write_text("no table")
    with pytest.raises(ClientError, match=r"broken\.parquet is not what its ending says"):
        load(str(tmp_path / "broken.parquet"))
    with pytest.raises(ClientError, match="hub@COMMIT"):
        load("rmbench=hub")
    for wrong in ("rmbench", "rmbnech=hub@1", str(tmp_path / "absent.json")):
        with pytest.raises(ClientError, match=f"{wrong}: .*no such file.* rmbench, each with =hub@COMMIT or =FILE"):
            load(wrong)


def test_sets_of_one_name_are_refused_before_anything_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / folder / "p.txt" for folder in "ab"]
    for path in paths:
        path.parent.mkdir()
        path.write_text(f"{path.parent.name}?\n")
    assert main(["eval", *map(str, paths), "--out", str(tmp_path / "runs.jsonl")]) == 1
    assert f"{paths[0]} and {paths[1]} would both be called p.txt" in capsys.readouterr().err


def answered(
    rewards: Sequence[float | None], texts: list[str], seed: int = 0, method: str = "bon"
) -> tuple[sweep.Asked, Record]:
    """A request and the record of its answer."""
    settings = sweep.settings_of(parsed(""), [f"{method}@{len(texts)}"], SERVED)
    (asked,) = sweep.asked([(0, Prompt("p", "Hotel?"))], settings, (seed,), raw=False)
    choices = [
        {"index": i, "message": {"content": text}, "reward": reward, "trajectory": i}
        for i, (text, reward) in enumerate(zip(texts, rewards, strict=True))
    ]
    report = {"method": method, "seed": seed, "steps": 8, "model_calls": 8, "reward_calls": 24, "queue_ms": 0.0}
    report |= {"generation_ms": 1.0, "model_calls_total": 16, "reward_calls_total": 50, "rewards": [rewards]}
    usage = {"prompt_tokens": 2, "completion_tokens": 6, "completion_tokens_details": {"trajectory_tokens": 12}}
    body = {"id": "a", "model": "dlm", "choices": choices, "guidance": report, "usage": usage}
    return asked, Record("a", asked.request.custom_id, Response(200, body), asked.request, "http://one", 2.0)


def test_measures_of_an_answer_and_the_operations_of_its_networks() -> None:
    pairs_ = [answered([2.0, 1.0], ["A nice hotel.", "A hotel."]), answered([4.0, 0.0], ["Good.", "Bad."], seed=1)]
    answers = read([asked for asked, _ in pairs_], {record.custom_id: record for _, record in pairs_}, SERVED)
    answers[0].values["other"] = [3.0, 5.0]
    found = by_prompt(answers, answers[0].asked.setting.name)
    assert {name: rows["p"] for name, rows in found.items()} == {
        "Top@1": 3.0, "Avg@N": 1.75, "other Top@1": 3.0, "other Avg@N": 4.0, "words": 2.0, "tokens": 6.0,
        "distinct-1": pytest.approx((3 / 5 + 1) / 2), "distinct-2": pytest.approx(0.5), "model calls": 16.0,
        "reward calls": 50.0, "seconds": 2.0,
        # 10 tokens a pass: 16 passes of 1000 parameters, and 50 of 100
        "GFLOPs": pytest.approx(2 * 10 * (16 * 1000 + 50 * 100) / 1e9),
    }  # fmt: skip
    guided, record = answered([2.0, 1.0], ["A nice hotel.", "A hotel."], method="entrgi")
    (answer,) = read([guided], {record.custom_id: record}, SERVED)  # 48 passes there and back, and 2 scores
    assert answer.cost.flops == pytest.approx(2 * 10 * (16 * 1000 + (2 * 48 + 2) * 100))
    older = [Model("dlm", {"defaults": DETAILS}), Model("rm", {"type": "reward"})]  # which tell no sizes
    answers = read([pairs_[0][0]], {pairs_[0][1].custom_id: pairs_[0][1]}, older)
    assert "GFLOPs" not in by_prompt(answers, answers[0].asked.setting.name)
    assert distinct(["a b a b", "a b"], 2) == pytest.approx(2 / 4)


def test_rows_are_trls_and_tell_where_they_come_from(tmp_path: Path) -> None:
    asked, record = answered([2.0, 1.0], ["A nice hotel.", "A hotel."])
    rows = list(sample_rows(asked, completion_of(record), keep=2))
    turn = [{"role": "user", "content": "Hotel?"}]
    assert [row["prompt"] for row in rows] == [turn, turn]
    assert rows[1]["completion"] == [{"role": "assistant", "content": "A hotel."}]
    assert (rows[1]["reward"], rows[1]["rewards"], rows[1]["trajectory"]) == (1.0, [2.0, 1.0], 1)
    assert json.loads(rows[0]["settings"]) == asked.setting.fields
    (pair,) = pairs(asked, completion_of(record))
    assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) == ("A nice hotel.", "A hotel.")
    assert (pair["score_chosen"], pair["score_rejected"]) == (2.0, 1.0)
    late, unscored = answered([None, None], ["A hotel.", "A nice hotel."])  # a scorer that did not answer in time
    assert list(pairs(late, completion_of(unscored))) == read([late], {unscored.custom_id: unscored}, SERVED) == []
    same, equal = answered([1.0, 1.0], ["A hotel.", "A hotel."])
    assert list(pairs(same, completion_of(equal))) == []
    for name in ("data.parquet", "data.jsonl"):
        assert write_rows(tmp_path / name, rows, SAMPLES, raw=False) == 2
    read_back = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text("utf-8").splitlines()]
    assert parquet.read_table(tmp_path / "data.parquet").to_pylist() == read_back == rows
    for found, name in (([pair], "pairs.parquet"), ([], "none.parquet")):
        assert write_rows(tmp_path / name, found, PAIRS, raw=False) == len(found)
        assert parquet.read_table(tmp_path / name).to_pylist() == found
    assert parquet.read_schema(tmp_path / "none.parquet") == parquet.read_schema(tmp_path / "pairs.parquet")


@pytest.mark.parametrize("command", ["sample --out", "sample --out d.jsonl --pairs", "compare --out j.jsonl --pairs"])
@pytest.mark.parametrize(("name", "told"), [("d.csv", "ends in .jsonl or .parquet"), ("no/d.jsonl", "no folder no")])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_asked(
    command: str, name: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*command.split(), name, "--prompts", "p.txt"])
    assert f"argument {command.split()[-1]}: {name}: " in (said := " ".join(capsys.readouterr().err.split()))
    assert told in said


def test_parquet_without_pyarrow_is_refused_before_anything_is_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert main(["sample", "--prompts", "absent.txt", "--out", "d.parquet"]) == 1
    assert "is not installed: pip install 'entrgi-client[eval]'" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("wrong", ["4/4", "-1/4", "1"])
def test_a_shard_is_one_of_so_many(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert samples.shard("1/4") == (1, 4)
    with pytest.raises(SystemExit):
        main(["sample", "--prompts", "p.txt", "--out", "d.jsonl", f"--shard={wrong}"])
    assert "--shard: wanted is I/N with I from 0 to N - 1" in capsys.readouterr().err


def test_intervals_and_corrected_differences_agree_with_theory() -> None:
    values = [math.sin(number) for number in range(40)]
    found = interval(values)
    expected = stats.t.interval(0.95, 39, loc=sum(values) / 40, scale=stats.sem(values))
    assert (found.low, found.high) == (pytest.approx(expected[0], abs=0.05), pytest.approx(expected[1], abs=0.05))
    assert interval([2.0, 2.0]) == interval([2.0])
    baseline = {str(number): value for number, value in enumerate(values)}
    better = {name: value + 0.5 + 0.1 * math.cos(int(name)) for name, value in baseline.items()}
    same = {name: value + (-1) ** int(name) for name, value in baseline.items()}
    told = differences(baseline, {"better": better, "same": same, "elsewhere": {"x": 1.0}})
    assert told.keys() == {"better", "same"}
    assert told["better"].change.low > 0.4
    assert told["better"].p == pytest.approx(2 * 2 / 10_000)  # the least that the permutations can tell, twice: Holm's
    assert told["same"].p > 0.5
    assert told["better"].prompts == 40
    assert differences(baseline, {}) == {}


@pytest.mark.parametrize(
    ("text", "score"),
    [('{"score": 4}', 4.0), ("3.86", 3.86), ("Score: 5 of 5", 5.0), ("10", None), ("", None), ("It fails.", None)],
)
def test_a_judges_score_is_the_number_in_its_answer(text: str, score: float | None) -> None:
    body = {"choices": [{"message": {"content": text}}]}
    asked, _ = answered([1.0], ["A hotel."])
    assert Judge.score(Record("a", "a", Response(200, body), asked.request, "http://judge", 1.0)) == score


@pytest.mark.parametrize("body", [{"choices": []}, {"choices": [{"message": {"content": None}}]}, {}, [], None])
def test_an_answer_without_text_is_no_judgement(body: Any) -> None:
    asked, _ = answered([1.0], ["A hotel."])
    assert Judge.score(Record("a", "a", Response(200, body), asked.request, "http://judge", 1.0)) is None

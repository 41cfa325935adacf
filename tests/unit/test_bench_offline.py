"""The offline benchmark: its workloads, its arithmetic, its report and plots, and every case from end to end, small."""

from __future__ import annotations

import io
import json
import xml.etree.ElementTree
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from benchmarks import cases, offline, plots, sweeps
from benchmarks.checkpoints import Shape
from benchmarks.flops import Flops
from benchmarks.harness import Bench, cpu_ratio, ratio, row, utilisation
from benchmarks.machine import Rate, gemm_rate
from benchmarks.report import CaseResult, Figure, keep, show
from benchmarks.sweeps import Fit
from benchmarks.workload import Pair, Run, Workload, load, only_first_trajectory, run_plain, same_tokens
from server.wire.stats import RunnerStats
from server.worker.savings import Savings

DREAM = Path(__file__).resolve().parents[1] / "golden" / "dream-tiny"
TINY = Workload(prompts=2, best_of=2, max_tokens=8, steps=2, gradient_steps=1, prompt_words=7)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """All cases on tiny models and workloads."""
    for module, name in ((cases, "SMALL"), (sweeps, "SMALL"), (cases, "EXACT")):
        monkeypatch.setattr(module, name, TINY)
    monkeypatch.setattr(cases, "AT_ONCE", (1, 2))
    small = replace(cases.LLADA_SMALL, prompts=2, max_tokens=4, steps=2, prompt_tokens=5)
    monkeypatch.setattr(cases, "LLADA_SMALL", small)
    monkeypatch.setattr("benchmarks.harness.LLADA_126K", Shape(400, 16, 2, 2, 32))
    monkeypatch.setattr(Bench, "rate", lambda self, dtype: Rate(1e9, 1e9))
    return Bench(tmp_path, torch.device("cpu"), torch.float32, True, 1, 0, DREAM / "dlm", DREAM / "rm")


@pytest.fixture(scope="module")
def pair() -> Pair:
    return load(DREAM / "dlm", DREAM / "rm", torch.float32, torch.device("cpu"))


def run(seconds: float, tokens: int = 10, *, cpu: float = 1.0, flops: int = 0) -> Run:
    stats = RunnerStats()
    stats.model_forward_seconds.add(seconds / 2)
    return Run(seconds, cpu, {"a": ((1,) * tokens,)}, stats, Flops(trunk=flops))


def test_request_sets_differ_in_seeds_and_prompts_and_not_in_lengths(pair: Pair) -> None:
    jobs = [job for number in range(3) for job in Workload(prompts=16).jobs(pair, number)]
    assert len({job.sampling.seed for job in jobs}) == len({job.id for job in jobs}) == 48
    assert len({job.prompt_ids for job in jobs}) == 48
    by_index = [[len(job.conversation[0].content) for job in jobs[index::16]] for index in range(16)]
    assert all(len(set(lengths)) == 1 for lengths in by_index)
    assert Workload(prompts=2).jobs(pair, 1) == Workload(prompts=2).jobs(pair, 1)


def test_prompts_have_the_length_that_was_asked_for(pair: Pair) -> None:
    assert {len(job.prompt_ids) for job in Workload(prompt_tokens=20).jobs(pair)} == {20}
    assert {len(job.conversation[0].content.split()) for job in Workload(prompt_words=30).jobs(pair)} == {30}


def test_the_first_trajectory_alone_is_that_of_the_whole_job(pair: Pair) -> None:
    jobs = TINY.jobs(pair)
    whole, alone = run_plain(pair, jobs), run_plain(pair, [only_first_trajectory(jobs[0])])
    assert alone.token_ids[jobs[0].id] == whole.token_ids[jobs[0].id][:1]
    assert same_tokens(alone, whole) == 1.0
    assert (alone.tokens, whole.tokens) == (TINY.max_tokens, TINY.tokens)


def test_same_tokens_is_a_share_of_trajectories() -> None:
    one = Run(1.0, 1.0, {"a": ((1, 2), (3, 4)), "b": ((5,),)})
    assert same_tokens(one, Run(1.0, 1.0, {"a": ((1, 2), (3, 5)), "c": ((5,),)})) == 0.5
    with pytest.raises(ValueError, match="in common"):
        same_tokens(one, Run(1.0, 1.0, {"z": ()}))


def test_ratios_are_taken_round_by_round() -> None:
    slower, faster = [run(8.0), run(80.0), run(6.0)], [run(2.0), run(20.0), run(1.0)]
    assert ratio(slower, faster) == pytest.approx(4.0)
    assert ratio([run(8.0, tokens=5)], faster) == pytest.approx(8.0)
    assert cpu_ratio([run(1.0, cpu=3.0)], faster) == pytest.approx(3.0)


def test_utilisation_and_the_row_of_a_variant() -> None:
    runs = [run(2.0, flops=100, cpu=4.0), run(1.0, flops=100, cpu=2.0), run(4.0, flops=100, cpu=2.0)]
    assert utilisation(runs, Rate(100.0, 50.0)) == 0.5
    found = row(runs, Rate(100.0, 50.0), variant="x")
    assert (found["variant"], found["seconds"], found["least_seconds"], found["cpu_seconds"]) == ("x", 2.0, 1.0, 2.0)
    assert found["cpu_utilisation"] == 1.0
    assert found["seconds_by_phase"]["diffusion"] == found["seconds_by_phase"]["rest"] == 1.0
    assert found["utilisation_by_phase"]["diffusion"] == 1.0


def test_fits_of_lines_and_powers() -> None:
    x = [1.0, 2.0, 4.0, 8.0]
    assert Fit.of(x, [v**0.5 for v in x]).exponent == pytest.approx(0.5)
    y = [12.0, 11.5, 14.1, 18.3]
    assert Fit.of(x, y).r_squared == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)
    with pytest.raises(ValueError, match="three"):
        Fit.of([1.0, 2.0], [1.0, 2.0])


def test_a_gemm_rate_is_a_rate() -> None:
    rate = gemm_rate(torch.float32, torch.device("cpu"), products=[(64, 64, 64)], seconds=0.01)
    assert all(1e6 < each < 1e15 for each in (rate.wall, rate.cpu))


def test_variants_alternate_and_share_request_sets(bench: Bench) -> None:
    order: list[tuple[str, int]] = []

    def variant(name: str) -> Callable[[int], Run]:
        return lambda number: order.append((name, number)) or run(1.0)  # type: ignore[func-returns-value]

    bench.first_set = 5
    runs = bench.in_turn({"a": variant("a"), "b": variant("b")}, title="t", repetitions=3)
    assert order == [("a", 5), ("b", 5), ("b", 6), ("a", 6), ("a", 7), ("b", 7)]
    assert {name: len(each) for name, each in runs.items()} == {"a": 3, "b": 3}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(offline.CASES))
def test_a_case_measures_and_its_report_and_plots_can_be_made(name: str, bench: Bench, tmp_path: Path) -> None:
    result = offline.CASES[name](bench)
    assert result.case == name
    assert result.rows
    assert all(entry["seconds"] > 0 and entry["variant"] for entry in result.rows)
    assert all(entry["same_tokens"] == 1.0 for entry in result.rows if "same_tokens" in entry)
    if name == "ablation":
        variants = {entry["variant"].split(",")[1].strip() for entry in result.rows}
        assert {f"no {saving.name}" for saving in fields(Savings)} <= variants
    document = json.loads(json.dumps(keep({"bench": "offline"}, [result], tmp_path)))
    shown = io.StringIO()
    show([result], Console(file=shown, width=250))
    assert all(figure.name in shown.getvalue() for figure in result.figures)
    drawn = plots.draw(document, tmp_path / "plots")
    assert len(drawn) == 2 * len(plots.PLOTS.get(name, {}))
    for path in drawn:
        if path.suffix == ".svg":
            assert xml.etree.ElementTree.parse(path).getroot().tag.endswith("svg")
        else:
            assert path.read_bytes().startswith(b"\x89PNG")


def test_the_document_is_kept_and_drawn_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row([run(2.0)], Rate(1.0, 1.0), variant="one"), row([run(3.0)], Rate(1.0, 1.0), variant="two")]
    result = CaseResult("headline", rows, [Figure("f", 1.0, at_least=2.0)], 1.0)
    path = tmp_path / "offline.json"
    assert keep({"bench": "offline"}, [result], tmp_path) == json.loads(path.read_text())
    assert json.loads(path.read_text())["cases"][0]["figures"][0]["met"] is False
    for folder in (tmp_path, tmp_path / "again"):
        monkeypatch.setattr("sys.argv", ["plots", str(path), "--out", str(folder)])
        plots.main()
        assert capsys.readouterr().out.split() == [str(folder / "phases.png"), str(folder / "phases.svg")]
    assert (tmp_path / "phases.svg").read_bytes() == (tmp_path / "again" / "phases.svg").read_bytes()

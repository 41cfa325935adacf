"""`make bench-online` against a real server on tiny models, and the arithmetic of what HTTP adds."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from benchmarks import online, plots
from benchmarks.online import Size, measure, parser, row
from benchmarks.overhead import LIMIT, Half, figures, rows
from benchmarks.processes import read_metrics, served
from benchmarks.report import keep
from clients.errors import ClientError
from clients.loadgen import Outcome, summarise

DREAM = Path(__file__).resolve().parents[1] / "golden" / "dream-tiny"
TINY = Size(max_tokens=4, steps=2, in_flight=(1, 2), requests_each=1.0, arrivals=4, rates=(0.5,), rounds=2, reference=2)


def given(*arguments: str) -> argparse.Namespace:
    return parser().parse_args(["--dlm", str(DREAM / "dlm"), "--rm", str(DREAM / "rm"), "--threads", "1", *arguments])


@pytest.mark.slow
async def test_every_case_against_a_real_server(tmp_path: Path) -> None:
    """The overhead's two halves compute the same tokens, or it raises."""
    results = await measure(given(), TINY)
    rows = {case.case: case.rows for case in results}
    assert set(rows) == set(online.CASES)
    for case in ("closed", "open", "streams"):
        assert all(entry["ok"] == entry["requests"] and entry["tokens_per_s"] > 0 for entry in rows[case])
        assert all(0 < entry["first_text_p50"] <= entry["latency_p95"] for entry in rows[case])
    assert [entry["in_flight"] for entry in rows["closed"]] == [1, 2, 1, 2]
    http, process = rows["overhead"]
    assert (http["rounds"], process["rounds"], process["engine_steps"]) == (2, 2, 2)
    assert http["engine_steps"] >= 2
    drawn = plots.draw(json.loads(json.dumps(keep({"bench": "online"}, results, tmp_path))), tmp_path)
    assert {path.name for path in drawn} == {f"online-{c}.{k}" for c in ("closed", "open") for k in ("png", "svg")}


async def test_a_server_that_cannot_start_says_why() -> None:
    with pytest.raises(ClientError, match="no-such-folder"):
        async with served(["--model", "./no-such-folder"]):
            pass


def test_the_overhead_is_taken_round_by_round() -> None:
    http = [Half(1.1, 33, []), Half(2.04, 33, []), Half(1.02, 33, [])]
    process = [Half(1.0, 32, []), Half(2.0, 32, []), Half(1.0, 32, [])]
    share, least = figures(http, process)
    assert (share.value, least.value) == (pytest.approx(0.02), pytest.approx(0.02))
    assert share.met is True
    worse, _ = figures([Half(1 + 2 * LIMIT, 33, [])], [Half(1.0, 32, [])])
    assert worse.met is False
    assert [entry["step_ms"] for entry in rows(http, process)] == pytest.approx([1000 * 1.1 / 33, 1000 / 32])


def test_percentiles_of_what_was_measured_become_columns() -> None:
    outcomes = [Outcome("ok", 0.0, 1.0, first_text_seconds=0.5, tokens=8), Outcome("429", 0.0, 0.1)]
    found = row(summarise(outcomes, offered=None, seconds=2.0), variant="x")
    assert (found["ok"], found["requests"], found["tokens_per_s"]) == (1, 2, 4.0)
    assert (found["latency_p50"], found["first_text_p99"]) == (1.0, 0.5)
    assert "step_p50" not in found


def test_metrics_are_read_as_prometheus_writes_them() -> None:
    registry = CollectorRegistry()
    Counter("entrgi:steps", "h", registry=registry).inc(41)
    Histogram("entrgi:seconds", "h", buckets=(1.0,), registry=registry).observe(0.25)
    Counter("entrgi:labelled", "h", ["name"], registry=registry).labels("x").inc()
    found = read_metrics(generate_latest(registry).decode())
    assert (found["entrgi:steps_total"], found["entrgi:seconds_count"], found["entrgi:seconds_sum"]) == (41, 1, 0.25)
    assert not any(name.startswith("entrgi:labelled_total") for name in found)


def test_arguments_that_do_not_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in (["--dlm", "x"], ["--url", "http://x", "--case", "overhead"]):
        monkeypatch.setattr("sys.argv", ["online", *arguments])
        with pytest.raises(SystemExit):
            online.main()

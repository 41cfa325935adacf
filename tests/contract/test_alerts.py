"""The alert rules, evaluated by Prometheus's own rule tester: what fires, when, and what stays quiet."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.serving import ROOT

RULES = ROOT / "deploy" / "prometheus" / "alerts.yml"
UP = "up{job='entrgi', instance='a'}"
READY = "entrgi:worker_ready{job='entrgi', instance='a', worker='%d'}"
WAIT = "entrgi:request_queue_time_seconds_bucket{le='%s'}"
RUNNING = "entrgi:num_requests_running"
HEALTHY = {UP: "1+0x60", READY % 0: "1+0x60", READY % 1: "1+0x60"}


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text("utf-8"))["groups"] for rule in group["rules"]]


def test_every_alert_waits_says_what_is_wrong_and_how_bad_it_is() -> None:
    for rule in rules():
        assert rule["for"] in {"1m", "2m", "5m"}, rule["alert"]
        assert rule["labels"]["severity"] in {"page", "warn"}
        assert rule["annotations"]["summary"]


# Series by the minute (a value, what is added, how often), a minute, and the alerts that fire then.
SITUATIONS: list[tuple[str, dict[str, str], int, set[str]]] = [
    ("all is well", {}, 30, set()),
    ("the scrape fails", {UP: "1 1 0+0x60"}, 4, {"ServerDown"}),
    ("a scrape failed once", {UP: "1 1 0 1+0x60"}, 4, set()),
    ("one of two workers is gone", {READY % 1: "1 0+0x60"}, 5, set()),
    ("it stays away", {READY % 1: "1 0+0x60"}, 7, {"WorkerMissing"}),
    ("no worker is ready", {READY % 0: "1 0+0x60", READY % 1: "1 0+0x60"}, 4, {"NoWorkerReady"}),
    ("for long", {READY % 0: "1 0+0x60", READY % 1: "1 0+0x60"}, 7, {"NoWorkerReady", "WorkerMissing"}),
    ("a restart", {READY % 0: "1 0 1+0x60", READY % 1: "1 0 1+0x60"}, 5, set()),
    ("another server's workers do not hide it", {READY.replace("'a'", "'b'") % 0: "0+0x60"}, 4, {"NoWorkerReady"}),
    ("workers die again and again", {"entrgi:worker_restarts_total": "0+1x60"}, 15, {"WorkerRestarting"}),
    ("a worker died once", {"entrgi:worker_restarts_total": "0 0 1+0x60"}, 15, set()),
    ("memory runs out", {"entrgi:out_of_memory_batches_total": "0+1x60"}, 15, {"OutOfMemory"}),
    ("refusals", {"entrgi:admission_rejections_total{reason='too_many_connections'}": "0+60x60"}, 15, {"Rejecting"}),
    ("nothing moves", {RUNNING: "3+0x60", "entrgi:denoising_steps_total": "7+0x60"}, 15, {"Stuck"}),
    ("waiting", {WAIT % "30.0": "0+1x60", WAIT % "60.0": "0+60x60", WAIT % "+Inf": "0+60x60"}, 15, {"Queueing"}),
]


def test_every_alert_fires_in_some_situation() -> None:
    assert sorted(rule["alert"] for rule in rules()) == sorted({name for *_, alerts in SITUATIONS for name in alerts})


@pytest.mark.skipif(shutil.which("promtool") is None, reason="Prometheus's own checker is not installed")
def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    # promtool compares whole alerts; `ALERTS` names them as series, of which only the names are of interest.
    tests = [
        {
            "name": name,
            "interval": "1m",
            "input_series": [{"series": each, "values": values} for each, values in {**HEALTHY, **series}.items()],
            "promql_expr_test": [
                {
                    "expr": "group by (alertname) (ALERTS{alertstate='firing'})",
                    "eval_time": f"{minute}m",
                    "exp_samples": [{"labels": f'{{alertname="{alert}"}}', "value": 1} for alert in sorted(alerts)],
                }
            ],
        }
        for name, series, minute, alerts in SITUATIONS
    ]
    path = tmp_path / "situations.yml"
    path.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": tests}))
    done = subprocess.run(["promtool", "test", "rules", str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr

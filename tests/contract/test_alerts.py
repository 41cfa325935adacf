"""The alert rules, evaluated by Prometheus's own rule tester: what fires, when, and what stays quiet."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import Any

import pytest
import yaml

from tests.support.serving import ROOT

PROMETHEUS = ROOT / "deploy" / "prometheus"


def load(name: str) -> Any:
    return yaml.safe_load((PROMETHEUS / name).read_text("utf-8"))


def rules() -> list[dict[str, Any]]:
    return [rule for group in load("alerts.yml")["groups"] for rule in group["rules"]]


def test_every_alert_waits_says_what_is_wrong_and_how_bad_it_is() -> None:
    for rule in rules():
        assert rule["for"] in {"1m", "2m", "5m"}, rule["alert"]
        assert rule["labels"]["severity"] in {"page", "warn"}
        assert rule["annotations"]["summary"]


def test_every_alert_fires_in_some_situation_and_is_quiet_where_its_series_are_in_another() -> None:
    """A situation in which nothing that an alert asks for is there shows nothing of it."""
    found: dict[str, set[bool]] = {rule["alert"]: set() for rule in rules()}
    for situation in load("alerts.test.yml")["tests"]:
        (asked,) = situation["promql_expr_test"]
        firing = {re.search(r'"(\w+)"', sample["labels"])[1] for sample in asked["exp_samples"]}  # type: ignore[index]
        there = {each["series"].partition("{")[0] for each in situation["input_series"]}
        assert firing <= set(found)
        for rule in rules():
            if set(re.findall(r"entrgi:\w+|\bup\b", rule["expr"])) <= there:
                found[rule["alert"]].add(rule["alert"] in firing)
    assert found == {name: {True, False} for name in found}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="Prometheus's own checker is not installed")
def test_alerts_fire_when_they_should() -> None:
    command = ["promtool", "test", "rules", str(PROMETHEUS / "alerts.test.yml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr

"""The conformance clients' matrix, which hides no failure."""

from __future__ import annotations

import json
from pathlib import Path

from tests.conformance.__main__ import CLIENTS
from tests.conformance.matrix import Row, line, markdown

FOLDER = Path(__file__).resolve().parents[1] / "conformance"
PASSED = {"check": "chat", "passed": True, "seconds": 0.1, "error": None}
FAILED = {"check": "stream", "passed": False, "seconds": 0.1, "error": "no | answer\nsecond line"}


def test_every_folder_with_a_check_is_run() -> None:
    assert {path.parent.name for path in FOLDER.glob("*/check.*")} == {client.name for client in CLIENTS}


def test_a_row_passes_only_when_all_its_checks_ran_and_passed() -> None:
    assert Row("a", expected=1, checks=[PASSED]).passed
    assert not Row("a", expected=2, checks=[PASSED]).passed  # it ended early
    assert not Row("a", expected=2, checks=[PASSED, FAILED]).passed
    assert not Row("a", expected=1, checks=[PASSED], trouble="not done within 5 s").passed
    assert not Row("a").passed


def test_failures_are_in_every_form_of_the_matrix() -> None:
    rows = [Row("a", "1.0", expected=1, checks=[PASSED]), Row("b", "2.0", expected=2, checks=[PASSED, FAILED])]
    told = json.loads(line(rows))
    assert [each["passed"] for each in told["conformance"]] == [True, False]
    assert not told["passed"]
    page = markdown(rows)
    assert "| b | 2.0 | chat<br>stream | FAILED 1/2 |" in page
    assert "- b: stream: no | answer\n" in page

"""The conformance clients: exact pins, nothing of one machine, and a matrix that hides no failure."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conformance.__main__ import CLIENTS
from tests.conformance.matrix import Row, line, markdown

FOLDER = Path(__file__).resolve().parents[1] / "conformance"
PINNED = sorted(FOLDER.glob("*/requirements.txt"))
CUDA = re.compile(r"nvidia-.*|cuda-.*|triton|pytorch-triton.*")
PASSED = {"check": "chat", "passed": True, "seconds": 0.1, "error": None}
FAILED = {"check": "stream", "passed": False, "seconds": 0.1, "error": "no | answer\nsecond line"}


def requirements(path: Path) -> list[Requirement]:
    lines = path.read_text("utf-8").splitlines()
    return [Requirement(each) for each in lines if each.strip() and not each.lstrip().startswith("#")]


def test_every_folder_with_a_check_is_run() -> None:
    assert {path.parent.name for path in FOLDER.glob("*/check.py")} == {client.name for client in CLIENTS}
    assert len(PINNED) >= 6


@pytest.mark.parametrize("path", PINNED, ids=lambda path: path.parent.name)
def test_pins_are_exact_and_belong_to_no_machine(path: Path) -> None:
    """No options, URLs or hashes (Requirement refuses them), no CUDA libraries."""
    for requirement in requirements(path):
        assert re.fullmatch(r"==[0-9][0-9A-Za-z.]*", str(requirement.specifier)), requirement
        assert requirement.url is None
        assert not CUDA.fullmatch(requirement.name), requirement
    everything = {(canonicalize_name(each.name), str(each.specifier)) for each in requirements(path)}
    for wanted in requirements(path.with_suffix(".in")):
        assert (canonicalize_name(wanted.name), str(wanted.specifier)) in everything


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

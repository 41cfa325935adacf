"""`make gpu-check` runs to its end on any machine, and its reports say what it found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.serving import ROOT


@pytest.mark.slow
def test_the_check_of_a_gpu_runs_on_tiny_models_without_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu.check", "--device", "cpu", "--size", "tiny"]
    result = subprocess.run(
        [*command, "--output", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stdout + result.stderr
    document = json.loads((tmp_path / "gpu-check.json").read_text())
    parts = document["parts"]
    assert {name for name, report in parts.items() if "left_out" in report} == {"passes"}
    assert not [report["wrong"] for report in parts.values() if report.get("wrong")]
    assert all(row["same"] == row["runs"] > 0 for rows in parts["golden"]["tables"].values() for row in rows)
    (step,) = parts["step"]["tables"]["Steps"]
    assert step["tokens/s"] > 0
    page = (tmp_path / "gpu-check.md").read_text()
    assert all(f"| {name} | " in page for name in parts)


def test_a_machine_without_a_gpu_is_told_so() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    command = [sys.executable, "-m", "benchmarks.gpu.check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert "make doctor" in result.stderr


@pytest.mark.slow
def test_the_table_of_models_and_gpus_is_what_the_memory_model_says() -> None:
    pytest.importorskip("triton")
    from benchmarks.gpu.sizes import lines

    text = (ROOT / "docs" / "operations.md").read_text("utf-8")
    assert [line for line in lines() if line not in text] == [], "run `python -m benchmarks.gpu.sizes`"

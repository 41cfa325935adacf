"""The Triton kernels without a GPU: this folder's tests in triton's interpreter, and every kernel compiled for sm_80,
sm_89, sm_90 and sm_100 (no spills, limits kept, tensor cores used).

Whether triton interprets must be chosen before it is imported, and the interpreter turns numpy's warnings about
infinities that a kernel masks out into errors here, so each of these runs in a process of its own."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the inner run"),
]


def run(*arguments, **environment):
    command, others = [sys.executable, "-m", *arguments], {**os.environ, **environment}
    return subprocess.run(command, env=others, capture_output=True, text=True, check=False, timeout=880)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("files", "which", "at_least"),
    [
        (["test_accuracy.py", "test_bounds.py"], "triton-interpreter or fused-interpreter and not stats", 16),
        (["test_draw.py"], "triton-interpreter", 7),  # which both share
        (["test_update_exact.py"], "interpreter", 6),
        (["test_engine_on_triton.py"], "interpreter", 2),
        (["test_blocks.py"], "interpreter", 32),
    ],
    ids=["accuracy", "draw", "update", "engine", "blocks"],
)
def test_kernels_in_the_interpreter(files, which, at_least):
    warnings = "-W", "ignore::RuntimeWarning"
    files = [str(HERE / name) for name in files]
    result = run("pytest", "-q", "-p", "no:cacheprovider", *warnings, "-k", which, *files, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None
    assert int(passed[1]) >= at_least


@pytest.mark.timeout(900)
@pytest.mark.parametrize("architecture", [80, 89, 90, 100])
def test_kernels_compile_within_the_limits(architecture):
    """Each kernel in its heaviest form; `benchmarks.kernels.aot` without --quick compiles everything."""
    result = run("benchmarks.kernels.aot", "--quick", "--any-triton", "--arch", str(architecture))
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    kernels = {entry["name"]: entry for entry in json.loads(result.stdout.splitlines()[-1])["kernels"]}
    assert len(kernels) >= 10
    assert all(entry["stack_bytes"] == 0 for entry in kernels.values())
    fused = [entry for name, entry in kernels.items() if name.startswith("fused")]
    assert {name.split()[0] for name in kernels if name.startswith("fused")} == {"fused_step", "fused_mix"}
    assert len(fused) >= 5
    assert all(entry["tensor_core_instructions"] > 0 for entry in fused)
    assert all(entry["registers"] <= 255 for entry in fused)
    # The passes that move whole rows are bound by memory: they must load 128 bits at a time and leave room for many
    # warps (72 registers a thread are 28 warps on every one of these).
    streaming = [kernels["row_sums bf16"], kernels["step kind 2 write 2"]]
    assert all(entry["registers"] <= 72 and entry["wide_loads"] > 0 for entry in streaming)


def test_interpreted_kernels_are_refused():
    result = run("benchmarks.kernels.aot", TRITON_INTERPRET="1")
    assert result.returncode == 2
    assert "TRITON_INTERPRET" in result.stderr

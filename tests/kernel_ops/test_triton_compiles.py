"""Every Triton kernel compiled for sm_80, sm_90 and sm_100 on any machine: no spills, limits kept, tensor cores used.

A representative subset here (each kernel in its heaviest form); `benchmarks.kernels.aot` compiles everything."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_kernels_compile_within_the_limits(architecture):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels.aot", "--quick", "--arch", str(architecture)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=880,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    kernels = {entry["name"]: entry for entry in json.loads(result.stdout.splitlines()[-1])["kernels"]}
    assert len(kernels) >= 10
    assert all(entry["stack_bytes"] == 0 for entry in kernels.values())
    fused = [entry for name, entry in kernels.items() if name.startswith("fused")]
    assert len(fused) >= 2
    assert all(entry["tensor_core_instructions"] > 0 for entry in fused)
    assert all(entry["registers"] <= 255 for entry in fused)
    # The passes that move whole rows are bound by memory: they must load 128 bits at a time and leave room for many
    # warps (72 registers a thread are 28 warps on every one of these).
    streaming = [kernels["row_sums bf16"], kernels["step kind 2 write 2"]]
    assert all(entry["registers"] <= 72 and entry["wide_loads"] > 0 for entry in streaming)


def test_interpreted_kernels_are_refused():
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels.aot"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "TRITON_INTERPRET" in result.stderr

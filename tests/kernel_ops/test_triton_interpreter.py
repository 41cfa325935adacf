"""The Triton kernels without a GPU: the same tests in triton's interpreter, in a process of its own.

The interpreter must be chosen before triton is imported, and turns numpy's warnings about infinities that a kernel
masks out into errors here, so it cannot share a process with the rest of the suite."""

import importlib.util
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


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("files", "at_least"),
    [(["test_accuracy.py"], 9), (["test_draw.py"], 7), (["test_update_exact.py", "test_triton_variants.py"], 5)],
    ids=["accuracy", "draw", "update"],
)
def test_kernels_in_the_interpreter(files, at_least):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    result = subprocess.run(
        [*command, "-k", "interpreter", *(str(HERE / name) for name in files)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=880,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None
    assert int(passed[1]) >= at_least

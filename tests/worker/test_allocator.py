"""Large blocks stay with the process: after a few of the same size, the next faults in no pages."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from server.worker.allocator import keep_large_blocks

PROGRAM = """
import resource, sys, torch
from server.worker.allocator import keep_large_blocks
if sys.argv[1] == "keep":
    assert keep_large_blocks(float(sys.argv[2]))
faults = []
for _ in range(24):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(48 << 20, dtype=torch.uint8).fill_(1)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(max(faults[-4:]))
"""


def faults(*mode: str) -> int:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", PROGRAM, *mode]
    return int(subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings")
def test_large_blocks_come_back_without_page_faults() -> None:
    assert faults("keep", "4e9") < 20
    assert faults("leave") > 20  # what it is good for: even with huge pages there are two dozen
    assert faults("keep", "3e8") > 20  # blocks of 48 MiB are not kept where eight of them would be too much
    assert not keep_large_blocks(2e8)

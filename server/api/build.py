"""Which code this is: the version is `server.__version__`, the commit is found out here."""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VARIABLE = "SOURCE_COMMIT"
DESCRIBE = (
    "git",
    "--no-optional-locks",
    "-C",
    str(ROOT),
    "describe",
    "--always",
    "--dirty",
    "--abbrev=40",
    "--exclude=*",
)


@functools.cache
def commit() -> str:
    """The commit of this folder: what the image was told at its build (`SOURCE_COMMIT`), else what git says, with
    `-dirty` behind it where files differ from it; "unknown" where neither does."""
    if told := os.environ.get(VARIABLE):
        return told
    if not (ROOT / ".git").exists():  # git would go on to look in the folders around this one
        return "unknown"
    try:
        return subprocess.run(DESCRIBE, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"

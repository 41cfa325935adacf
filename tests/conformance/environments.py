"""One virtual environment a client, from its pinned requirements, below `build/conformance`; kept while they stay."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
BUILD = FOLDER.parents[1] / "build" / "conformance"
INSTALL_SECONDS = 1800


def python_of(client: str, log: Path) -> Path:
    """The interpreter of a client's environment, made if need be; pip's output goes to `log`. A client without
    requirements runs in ours. Raises CalledProcessError and TimeoutExpired."""
    requirements = FOLDER / client / "requirements.txt"
    if not requirements.exists():
        return Path(sys.executable)
    folder = BUILD / "environments" / client
    python, stamp = folder / "bin" / "python", folder / "installed"
    wanted = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()
    if stamp.exists() and stamp.read_text("utf-8") == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    with log.open("ab") as output:
        for command in ([sys.executable, "-m", "venv", str(folder)], [*pip, "-r", str(requirements)]):
            subprocess.run(command, check=True, stdout=output, stderr=output, timeout=INSTALL_SECONDS)
    stamp.write_text(wanted, "utf-8")
    return python

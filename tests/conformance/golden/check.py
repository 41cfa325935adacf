"""The recorded decoding runs of the published code, replayed over HTTP: the same tokens and rewards must come back,
one request at a time and sixteen at a time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

from checks import OUT, check, main, true

from tests.support.serving import GOLDEN, golden_flags, served

CASES = {
    folder.name: [name for name in ("trajectories", "blocks") if (folder / f"{name}.json").is_file()]
    for folder in sorted(GOLDEN.glob("*-tiny"))
}
CONCURRENCY = (1, 16)


def replay(name: str) -> Callable[[], None]:
    """The check of one checkpoint."""

    def run() -> None:
        failed = []
        with served(*golden_flags(name), log=OUT / f"{name}.log") as server:
            for file in CASES[name]:
                for concurrency in CONCURRENCY:
                    command = [sys.executable, str(GOLDEN / "run_golden.py"), "--base-url", server.url]
                    command += ["--cases", str(GOLDEN / name / f"{file}.json"), "--concurrency", str(concurrency)]
                    if subprocess.run(command, stdout=sys.stderr).returncode:
                        failed.append((file, concurrency))
        true(not failed, failed)

    run.__doc__ = f"{name}: {' and '.join(CASES[name])}, one and sixteen at a time"
    return run


for each in CASES:
    check(replay(each))

main()

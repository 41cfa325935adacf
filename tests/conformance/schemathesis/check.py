"""Schemathesis over the whole OpenAPI document: every route, every phase, every check. `hooks.py` and
`schemathesis.toml` say what it cannot know from the document."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from checks import KEY, OUT, URL, check, main, run, true

HERE = Path(__file__).parent
SEED = os.environ.get("CONFORMANCE_SEED", "1")
EXAMPLES = {"examples": 1, "coverage": 1, "fuzzing": 150, "stateful": 50}
"""Generated cases a route by phase; the coverage phase takes as many as the schemas have corners."""
if os.environ.get("CONFORMANCE_SHORT"):  # as the test suite runs it
    EXAMPLES = {"examples": 1, "fuzzing": 12, "stateful": 12}


def phase(name: str, number: int) -> Callable[[], str]:
    """The check of one phase."""

    def passes() -> str:
        report = OUT / f"{name}.json"
        report.unlink(missing_ok=True)
        done = run(
            *("st", "--config-file", str(HERE / "schemathesis.toml"), "--no-color"),
            *("run", f"{URL}/openapi.json", "--header", f"Authorization: Bearer {KEY}"),
            *("--phases", name, "--checks", "all", "--max-examples", str(number), "--seed", SEED),
            *("--workers", "2", "--request-timeout", "60", "--continue-on-failure"),
            *("--report", "json", "--report-json-path", str(report)),
            seconds=1200,
            SCHEMATHESIS_HOOKS="hooks",
            PYTHONPATH=os.pathsep.join([str(HERE), os.environ["PYTHONPATH"]]),
        )
        true(done.returncode == 0, f"{report}: {done.stdout[-1500:]}")
        cases = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
        true(cases and int(cases[2]) > 0, done.stdout[-1500:])
        return f"{cases[1]} cases"

    passes.__doc__ = f"{name} phase: all routes, all checks"
    return passes


for each, examples in EXAMPLES.items():
    check(phase(each, examples))

main("schemathesis")

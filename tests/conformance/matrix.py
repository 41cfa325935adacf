"""The conformance matrix: what each client did, as Markdown for `docs/`, and as one JSON line."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import dataclass, field
from typing import Any

from server import __version__

TITLE = """# Conformance

Real clients against a real server, each in an environment of its own with pinned versions (a `requirements.txt` or,
for Node.js 20 or newer, a `package-lock.json` for each below `tests/conformance`). `make conformance` installs them
below `build/conformance`, starts the server with the bundled models and an API key, runs every client, and writes this
page. One client's failure does not stop the others; each has a time limit. `ARGS="openai litellm"` runs only those and
leaves this page alone. What a client said is in its folder below `build/conformance/out`. Schemathesis starts from a
fixed seed; `CONFORMANCE_SEED` sets another.
"""


@dataclass
class Row:
    """One client's outcome."""

    client: str
    version: str = "?"
    checks: list[dict[str, Any]] = field(default_factory=list)
    expected: int = 0
    trouble: str | None = None
    """Why the client could not be run to its end."""
    seconds: float = 0.0

    @property
    def failures(self) -> list[str]:
        """What went wrong, one line each."""
        lines = [f"{each['check']}: {each['error']}" for each in self.checks if not each["passed"]]
        return lines + ([self.trouble] if self.trouble else [])

    @property
    def passed(self) -> bool:
        """Every check ran and passed."""
        return not self.failures and 0 < len(self.checks) == self.expected

    @property
    def result(self) -> str:
        """In a few words."""
        done = sum(each["passed"] for each in self.checks)
        return f"{'passed' if self.passed else 'FAILED'} {done}/{self.expected or '?'}"

    @property
    def exercised(self) -> list[str]:
        """The names of the checks that ran."""
        return [each["check"] for each in self.checks]


def markdown(rows: list[Row]) -> str:
    """For `docs/conformance.md`."""
    lines = [TITLE, f"Last run: {time.strftime('%Y-%m-%d')}, server {__version__}, Python {platform.python_version()}."]
    lines += ["", "| client | version | exercised | result |", "|---|---|---|---|"]
    for row in rows:
        exercised = "<br>".join(name.replace("|", "\\|") for name in row.exercised)
        lines.append(f"| {row.client} | {row.version} | {exercised} | {row.result} |")
    failures = [f"- {row.client}: {line.splitlines()[0]}" for row in rows for line in row.failures]
    if failures:
        lines += ["", "## Failures", "", *failures]
    return "\n".join(lines) + "\n"


def line(rows: list[Row]) -> str:
    """For programs."""
    names = ("client", "version", "exercised", "passed", "failures", "seconds")
    clients = [{name: getattr(row, name) for name in names} for row in rows]
    return json.dumps({"conformance": clients, "server": __version__, "passed": all(row.passed for row in rows)})

"""`python -m tests.conformance.dashboard`: every panel and every alert, asked of a Prometheus that really runs.

A server with the bundled models is put under load, Prometheus scrapes it with the repository's own configuration (only
the target's address is changed), and each expression of the Grafana dashboard and of the alert rules must come back
with at least one finite number. An alert's comparison is asked with `bool`, so that a quiet alert answers 0 rather
than nothing. Needs the `prometheus` binary (Debian: `apt-get install prometheus`). Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from tests.support.serving import ROOT, free_port, served, wait_answer

DASHBOARD = ROOT / "deploy/grafana/dashboards/entrgi.json"
PROMETHEUS = ROOT / "deploy/prometheus"
SCRAPES = 3  # after the load, so that rates see its end
COMPARISON = re.compile(r" (==|!=|>=|<=|>|<) (?!bool)")


@dataclass(frozen=True)
class Expression:
    """An expression as it stands in the file, and what is asked instead of it."""

    source: str
    text: str
    query: str


@dataclass(frozen=True)
class Answer:
    """How many series came back, and one of their values."""

    source: str
    expression: str
    series: int
    finite: int
    example: float | None
    error: str | None = None


def expressions() -> Iterator[Expression]:
    """Of all panels, then of all alerts."""
    for panel in json.loads(DASHBOARD.read_text("utf-8"))["panels"]:
        for target in panel.get("targets", []):
            text = target["expr"]
            query = text.replace("$__rate_interval", "1m").replace("$__range", "5m")
            yield Expression(f"panel {panel['title']}", text, query)
    for group in yaml.safe_load((PROMETHEUS / "alerts.yml").read_text("utf-8"))["groups"]:
        for rule in group["rules"]:
            yield Expression(f"alert {rule['alert']}", rule["expr"], COMPARISON.sub(r" \1 bool ", rule["expr"]))


class Prometheus:
    """The HTTP interface of a running one."""

    def __init__(self, url: str) -> None:
        self._url = url

    def get(self, path: str, **parameters: str) -> Any:
        """The `data` of an answer. Raises RuntimeError with Prometheus's own words."""
        url = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error).get("error", str(error))) from error

    def ask(self, expression: Expression) -> Answer:
        """The answer to an expression at this moment."""
        try:
            found = self.get("query", query=expression.query)["result"]
        except RuntimeError as error:
            return Answer(expression.source, expression.text, 0, 0, None, str(error))
        values = [float(series["value"][1]) for series in found]
        finite = [value for value in values if math.isfinite(value)]
        return Answer(expression.source, expression.text, len(values), len(finite), finite[0] if finite else None)


@contextmanager
def prometheus(target: str) -> Iterator[Prometheus]:
    """Prometheus with the repository's configuration, its one target being `host:port`."""
    address = f"127.0.0.1:{free_port()}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(PROMETHEUS, folder / "etc")
        configuration = yaml.safe_load((folder / "etc/prometheus.yml").read_text("utf-8"))
        configuration["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
        (folder / "etc/prometheus.yml").write_text(yaml.safe_dump(configuration), "utf-8")
        command = ["prometheus", f"--config.file={folder / 'etc/prometheus.yml'}", f"--web.listen-address={address}"]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen([*command, f"--storage.tsdb.path={folder / 'data'}"], stdout=log, stderr=log)
            try:
                wait_answer(f"http://{address}/-/ready", process, folder / "log")
                yield Prometheus(f"http://{address}")
            finally:
                process.terminate()
                process.wait(30)


def load(url: str, requests: int) -> None:
    """Unguided, best-of-n and guided requests from the load generator, one after the other."""
    for method in ("none", "bon", "entrgi"):
        command = [sys.executable, "-m", "clients", "loadgen", "--url", url, "--concurrency", "4", "--stream"]
        command += ["--requests", str(requests), "--guidance", method, "--max-tokens", "24"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, timeout=900)


def measure(requests: int) -> tuple[list[Answer], list[str]]:
    """The answers, and what is wrong with the rules as Prometheus itself evaluates them."""
    with (
        served("--public-paths", "/metrics", "--threads", "1") as server,
        prometheus(f"127.0.0.1:{server.port}") as asked,
    ):
        load(server.url, requests)
        interval = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text("utf-8"))["global"]["scrape_interval"]
        time.sleep(SCRAPES * float(interval.removesuffix("s")))
        answers = [asked.ask(expression) for expression in expressions()]
        groups = asked.get("rules")["groups"]
        wrong = [
            f"{rule['name']}: {rule['health']} {rule.get('lastError', '')}".strip()
            for group in groups
            for rule in group["rules"]
            if rule["health"] not in ("ok", "unknown")  # unknown: not evaluated yet
        ]
        if not groups:
            wrong.append("no rules were loaded")
        wrong += [f"scrape: {t['lastError']}" for t in asked.get("targets")["activeTargets"] if t["health"] != "up"]
    return answers, wrong


def main() -> int:
    """Exit status 0 when every expression has data and every rule is healthy, 2 without Prometheus."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance.dashboard", description=__doc__)
    parser.add_argument("--requests", type=int, default=12, help="of each of three methods (default: 12)")
    options = parser.parse_args()
    if shutil.which("prometheus") is None:
        print("there is no `prometheus` on the path (Debian: apt-get install prometheus)", file=sys.stderr)
        return 2
    answers, wrong = measure(options.requests)
    table = Table("where", "series", "finite", "example", "expression")
    for answer in answers:
        shown = "" if answer.example is None else f"{answer.example:.4g}"
        mark = "" if answer.finite else "[red]"
        table.add_row(f"{mark}{answer.source}", str(answer.series), str(answer.finite), shown, answer.expression[:90])
    Console(width=170).print(table)
    for line in wrong:
        print(line, file=sys.stderr)
    empty = [asdict(answer) for answer in answers if not answer.finite]
    print(
        json.dumps(
            {"expressions": len(answers), "with_data": len(answers) - len(empty), "empty": empty, "wrong": wrong}
        )
    )
    return 1 if empty or wrong else 0


if __name__ == "__main__":
    sys.exit(main())

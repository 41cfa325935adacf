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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml
from rich.console import Console
from rich.table import Table

from tests.support.serving import ROOT, free_port, served, wait_answer

DASHBOARD = ROOT / "deploy/grafana/dashboards/entrgi.json"
PROMETHEUS = ROOT / "deploy/prometheus"
SCORER = '{"name": "length", "target": "python:docs.scorers:length"}'
SCRAPES = 3  # after the load, so that rates see its end
COMPARISON = re.compile(r" (==|!=|>=|<=|>|<) (?!bool)")


def expressions() -> Iterator[tuple[str, str, str]]:
    """Of all panels, then of all alerts: where it stands, the expression, and what is asked instead of it."""
    for panel in json.loads(DASHBOARD.read_text("utf-8"))["panels"]:
        for target in panel.get("targets", []):
            text = target["expr"]
            query = text.replace("$__rate_interval", "1m").replace("$__range", "5m").replace("$instance", ".*")
            yield f"panel {panel['title']}", text, query
    for group in yaml.safe_load((PROMETHEUS / "alerts.yml").read_text("utf-8"))["groups"]:
        for rule in group["rules"]:
            yield f"alert {rule['alert']}", rule["expr"], COMPARISON.sub(r" \1 bool ", rule["expr"])


def get(url: str, path: str, **parameters: str) -> Any:
    """The `data` of one of Prometheus's answers. Raises RuntimeError with its own words."""
    answer = httpx.get(f"{url}/api/v1/{path}", params=parameters, timeout=30).json()
    if answer["status"] != "success":
        raise RuntimeError(answer["error"])
    return answer["data"]


def ask(url: str, source: str, text: str, query: str) -> dict[str, Any]:
    """How many series an expression has at this moment, how many of them are finite, and one such value."""
    values, error = [], None
    try:
        values = [float(series["value"][1]) for series in get(url, "query", query=query)["result"]]
    except RuntimeError as raised:
        error = str(raised)
    finite = [value for value in values if math.isfinite(value)]
    counted = {"series": len(values), "finite": len(finite), "example": finite[0] if finite else None}
    return {"source": source, "expression": text, **counted, "error": error}


@contextmanager
def prometheus(target: str) -> Iterator[str]:
    """The address of a Prometheus with the repository's configuration, its one target being `host:port`."""
    url = f"http://127.0.0.1:{free_port()}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(PROMETHEUS, folder / "etc")
        configuration = yaml.safe_load((folder / "etc/prometheus.yml").read_text("utf-8"))
        configuration["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
        (folder / "etc/prometheus.yml").write_text(yaml.safe_dump(configuration), "utf-8")
        command = ["prometheus", f"--config.file={folder / 'etc/prometheus.yml'}", f"--web.listen-address={url[7:]}"]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen([*command, f"--storage.tsdb.path={folder / 'data'}"], stdout=log, stderr=log)
            try:
                wait_answer(f"{url}/-/ready", process, folder / "log")
                yield url
            finally:
                process.terminate()
                process.wait(30)


def load(url: str, requests: int) -> None:
    """Unguided, best-of-n, guided and resampled requests from the load generator, one after the other."""
    for method in ("none", "bon", "entrgi", "smc"):
        command = [sys.executable, "-m", "clients", "loadgen", "--url", url, "--concurrency", "4", "--stream"]
        command += ["--requests", str(requests), "--guidance", method, "--max-tokens", "24"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, timeout=900)
    scored = {"prompt": "The hotel", "max_tokens": 8, "guidance": {"method": "bon", "reward_model": "length"}}
    for _ in range(requests):
        httpx.post(f"{url}/v1/completions", json=scored, timeout=120).raise_for_status()


def measure(requests: int) -> tuple[list[dict[str, Any]], list[str]]:
    """The answers, and what is wrong with the rules as Prometheus itself evaluates them."""
    with (
        served("--public-paths", "/metrics", "--threads", "1", "--scorers", SCORER) as server,
        prometheus(f"127.0.0.1:{server.port}") as url,
    ):
        load(server.url, requests)
        interval = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text("utf-8"))["global"]["scrape_interval"]
        time.sleep(SCRAPES * float(interval.removesuffix("s")))
        answers = [ask(url, *expression) for expression in expressions()]
        rules = [rule for group in get(url, "rules")["groups"] for rule in group["rules"]]
        sick = [rule for rule in rules if rule["health"] not in ("ok", "unknown")]  # unknown: not evaluated yet
        wrong = [f"{rule['name']}: {rule['health']} {rule.get('lastError', '')}".strip() for rule in sick]
        if not rules:
            wrong.append("no rules were loaded")
        wrong += [f"scrape: {t['lastError']}" for t in get(url, "targets")["activeTargets"] if t["health"] != "up"]
    return answers, wrong


def main() -> int:
    """Exit status 0 when every expression has data and every rule is healthy, 2 without Prometheus."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance.dashboard", description=__doc__)
    parser.add_argument("--requests", type=int, default=12, help="of each of four methods (default: 12)")
    options = parser.parse_args()
    if shutil.which("prometheus") is None:
        print("there is no `prometheus` on the path (Debian: apt-get install prometheus)", file=sys.stderr)
        return 2
    answers, wrong = measure(options.requests)
    table = Table("where", "series", "finite", "example", "expression")
    for source, text, series, finite, example, _ in map(dict.values, answers):
        shown = "" if example is None else f"{example:.4g}"
        table.add_row(f"{'' if finite else '[red]'}{source}", str(series), str(finite), shown, text[:90])
    Console(width=170).print(table)
    for line in wrong:
        print(line, file=sys.stderr)
    empty = [answer for answer in answers if not answer["finite"]]
    told = {"expressions": len(answers), "with_data": len(answers) - len(empty), "empty": empty, "wrong": wrong}
    print(json.dumps(told))
    return 1 if empty or wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m tests.conformance.overload`: the alert `Overloaded`, fired by an overload that really happens.

More clients at a time than the server answers quickly ask for guided answers, for long enough that the alert's wait is
over, while a Prometheus with the repository's own rules scrapes the server. Of the rules only `Overloaded` may fire,
and `Slow` where the machine is slow enough: nobody waits, and nothing fails. What Prometheus saw, once a minute, is
printed as a situation of `deploy/prometheus/alerts.test.yml`. Needs `prometheus` (`apt-get install prometheus`).
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import yaml

from tests.conformance.dashboard import PROMETHEUS, get, prometheus
from tests.support.serving import ROOT, served

STEP = 60  # seconds between two recorded values


def recorded(url: str, start: float, end: float) -> Iterator[dict[str, str]]:
    """The series that the rule reads, as promtool writes them."""
    groups = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text("utf-8"))["groups"]
    (rule,) = (rule["expr"] for group in groups for rule in group["rules"] if rule["alert"] == "Overloaded")
    for name in sorted(set(re.findall(r"entrgi:\w+", rule))):
        asked = {"query": name, "start": f"{start}", "end": f"{end}", "step": f"{STEP}"}
        for series in get(url, "query_range", **asked)["result"]:
            labels = {key: value for key, value in series["metric"].items() if key not in ("__name__", "job")}
            labels["instance"] = "a"
            values = {round((moment - start) / STEP): float(value) for moment, value in series["values"]}
            told = [f"{values[minute]:g}" if minute in values else "_" for minute in range(max(values) + 1)]
            shown = ",".join(f"{key}='{value}'" for key, value in sorted(labels.items()))
            yield {"series": f"{name}{{{shown}}}", "values": " ".join(told)}


def firing(url: str) -> set[str]:
    """The alerts that fire now."""
    return {alert["labels"]["alertname"] for alert in get(url, "alerts")["alerts"] if alert["state"] == "firing"}


def main() -> int:
    """Exit status 0 when the alert fired, and nothing but it and `Slow`."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance.overload", description=__doc__)
    parser.add_argument("--clients", type=int, default=14, help="requests in flight (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=9, help="of load (default: %(default)s)")
    options = parser.parse_args()
    fired: dict[str, float] = {}
    with (
        served("--public-paths", "/metrics", "--threads", "1") as server,
        prometheus(f"127.0.0.1:{server.port}") as url,
    ):
        command = [sys.executable, "-m", "clients", "loadgen", "--url", server.url, "--guidance", "entrgi"]
        command += ["--concurrency", str(options.clients), "--requests", "1000000"]
        start = time.time()
        load = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        try:
            while time.time() < start + 60 * options.minutes:
                time.sleep(5)
                fired |= dict.fromkeys(firing(url) - set(fired), round(time.time() - start))
        finally:
            load.terminate()
            load.wait()
        told: dict[str, Any] = {"fired_after_seconds": fired, "input_series": list(recorded(url, start, time.time()))}
        for name in ("e2e_request_latency_seconds", "request_queue_time_seconds"):
            query = f"histogram_quantile(0.95, sum by (le) (rate(entrgi:{name}_bucket[5m])))"
            told[f"{name}_p95"] = round(float(get(url, "query", query=query)["result"][0]["value"][1]), 4)
    print(yaml.safe_dump(told, sort_keys=False, width=1000))
    return 0 if {"Overloaded"} <= set(fired) <= {"Overloaded", "Slow"} else 1


if __name__ == "__main__":
    sys.exit(main())

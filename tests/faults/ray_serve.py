"""`make ray-check`: the server on Ray Serve, in an environment of its own (requirements-ray.lock).

Clients send the seeded catalogue of the other fault programs through Serve's proxy to two replicas, streams and clients
that leave among it, while a replica is killed three times. Promised: every request gets one answer, to the token; only
a stream that had begun may end with the named error, and where no replica can take a request, that with a 503. Then,
under load: a replica whose engine is dead is replaced; all replicas are replaced by a deployment, and no request
notices, or, with no time for a drain, only streams that had begun; two replicas become one, two and one again, and no
request notices. A stream's text comes while the rest is computed, and its work ends with its client. At the end the
same requests go to a server without Ray, in turns, to say what Ray adds.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families
from ray.serve.schema import ServeDeploySchema
from tqdm import tqdm

from tests.faults import harness
from tests.faults.harness import Verdict, quantiles
from tests.faults.load import CHAT, COMPLETIONS, EXACT, Case, Load, catalogue, chat, client
from tests.support.serving import ROOT, free_port

SERVE = str(Path(sys.executable).with_name("serve"))
KILLS = 3
BLOCKS = {"steps": 512, "block_length": 4}  # the first text is there after four steps
LONG = {"prompt": "The book was", "max_tokens": 512, "ignore_eos": True, "diffusion": BLOCKS, "stream": True}
SOON = 5.0  # seconds, of the many that LONG takes
PATIENCE = 600.0  # seconds; a replica is there after ten on quiet cores, and after a minute on busy ones
UNHARMED = {"right", "cancelled", "hurried"}
BROKEN_OFF = {"stream unavailable"}
NOBODY_THERE = {"503 unavailable", "503 not_ready"}
SETTINGS = {"device": "cpu", "dtype": "float64", "threads": 1, "spare_worker": False, "batch_trajectories": 16}
DASHBOARD = re.compile(r"View the dashboard at .*?(http://[\w.]+:\d+)")


class Cluster(harness.Server):
    """`serve run` on this machine, and what is seen of its processes."""

    @property
    def serving(self) -> set[str]:
        """The names of the replicas that have a ready worker, as /metrics has them."""
        families = text_string_to_metric_families(self.client.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples if sample.name == "entrgi:worker_ready"]
        return {sample.labels["replica"] for sample in samples if sample.value}

    def total(self, *names: str, **labels: str) -> float:
        """Of all replicas: the sum of samples with these names and labels."""
        families = text_string_to_metric_families(self.client.get("/metrics").text)
        samples = [each for family in families for each in family.samples if each.name.removeprefix("entrgi:") in names]
        return sum(each.value for each in samples if labels.items() <= each.labels.items())

    @property
    def in_flight(self) -> float:
        """Prompts that replicas know of."""
        return self.total("num_requests_running", "num_requests_waiting")

    def below(self, top: int, words: str) -> list[int]:
        """The processes below one of these words in their command lines."""
        told = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
        rows = [row.split(None, 2) for row in told.splitlines()]
        parents = {pid: parent for pid, parent, _ in rows}

        def is_below(pid: str) -> bool:
            return pid == str(top) or (pid in parents and is_below(parents[pid]))

        return [int(pid) for pid, _, line in rows if words in line and is_below(pid)]

    @property
    def replicas(self) -> list[int]:
        """The replicas' processes."""
        return self.below(self.process.pid, "ray::ServeReplica:entrgi:Model")

    def deploy(self, path: Path, **changes: Any) -> None:
        """Let Serve go over to a configuration."""
        path.write_text(yaml.safe_dump(configuration(self.port, **changes)))
        address = DASHBOARD.findall(self.log.read_text("utf-8"))[0]
        subprocess.run([SERVE, "deploy", "-a", address, str(path)], check=True, env=environment(), cwd=ROOT)


async def seconds_until(condition: Callable[[], bool]) -> float:
    """How long until the condition holds."""
    return await harness.seconds_until(condition, PATIENCE, 0.5)


def environment() -> dict[str, str]:
    """Of everything that belongs to the cluster."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("ENTRGI_")}
    return {**ours, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}


def configuration(port: int, least: int = 2, most: int = 2, **settings: Any) -> dict[str, Any]:
    """The example, with other numbers."""
    config = yaml.safe_load((ROOT / "deploy/ray/serve.yaml").read_text("utf-8"))
    config["http_options"]["port"] = port
    (app,) = config["applications"]
    app["args"] = {**SETTINGS, **settings}
    (model,) = app["deployments"]
    # It outlives replicas that have no time for a drain.
    app["deployments"].append({"name": "Ingress", "graceful_shutdown_timeout_s": 60})
    model["autoscaling_config"] |= {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": 3}
    model["autoscaling_config"] |= {"upscale_delay_s": 2, "downscale_delay_s": 6, "look_back_period_s": 4}
    model["autoscaling_config"]["metrics_interval_s"] = 1
    return config


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Serve with two replicas, ready; stopped at the end."""
    port, log, path = free_port(), folder / "log", folder / "serve.yaml"
    path.write_text(yaml.safe_dump(configuration(port)))
    with log.open("wb") as output:
        command = [SERVE, "run", str(path)]
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=output, stderr=output, process_group=0)
    server = Cluster(process, f"http://127.0.0.1:{port}", log)
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


async def kills(server: Cluster, load: Load, verdict: Verdict, count: int, pause: float, seed: int) -> None:
    """So many replicas die under load, one after the other; each is replaced. Where there is another, it takes over
    whatever has not begun."""
    generator, before = random.Random(seed), load.outcomes
    whole_after: list[float] = []
    there = len(server.serving)
    async with load.running():
        for _ in tqdm(range(count), desc=f"kills, {there} replicas"):
            await asyncio.sleep(pause)
            names = server.serving
            os.kill(generator.choice(server.replicas), signal.SIGKILL)
            whole_after.append(
                await seconds_until(lambda names=names: len(now := server.serving) == there and bool(now - names))
            )
        await asyncio.sleep(pause)
    outcomes = load.outcomes - before
    allowed = UNHARMED | BROKEN_OFF | (NOBODY_THERE if there == 1 else set())
    bad = {name: number for name, number in outcomes.items() if name not in allowed}
    what = f"{count} kills, {there} replicas"
    said = f"{what}: one answer each, right or one of {sorted(allowed - UNHARMED)}"
    verdict.promise(said, not bad, f"{outcomes} {load.wrong[:3]}")
    verdict.promise(f"{what}: replaced", max(whole_after) < math.inf, quantiles(whole_after, 50, 100))


async def until(
    server: Cluster,
    load: Load,
    verdict: Verdict,
    what: str,
    there: Callable[[], bool],
    harm: AbstractSet[str] = frozenset(),
) -> None:
    """Under load something will be so, and requests are not harmed, but for those that end in one of these ways."""
    before = load.outcomes
    async with load.running():
        seconds = await seconds_until(there)
        await asyncio.sleep(3)
    outcomes = load.outcomes - before
    seen = f"{seconds:.0f} s, {dict(outcomes)} {load.wrong[:2]}"
    kept = seconds < math.inf and set(outcomes) <= UNHARMED | harm
    verdict.promise(f"{what}: nothing is lost{f' but by {sorted(harm)}' if harm else ''}", kept, seen)


async def dead_engine(server: Cluster, load: Load, verdict: Verdict) -> None:
    """Every worker of one replica dies at once, again and again, until Serve replaces the replica."""
    replica = server.replicas[0]

    def replaced() -> bool:
        for pid in server.below(replica, "server.worker.loop"):
            os.kill(pid, signal.SIGKILL)
        return replica not in server.replicas and len(server.serving) == 2

    await until(server, load, verdict, "a dead engine is replaced", replaced, NOBODY_THERE | BROKEN_OFF)


async def deployment(
    server: Cluster, load: Load, verdict: Verdict, path: Path, harm: AbstractSet[str] = frozenset(), **changes: Any
) -> None:
    """All replicas are replaced by others with other settings."""
    names = server.serving
    server.deploy(path, **changes)
    what = f"a deployment with {changes}"
    await until(server, load, verdict, what, lambda: len(now := server.serving) == 2 and not now & names, harm)


async def leaving(server: Cluster, verdict: Verdict) -> None:
    """A long stream is read to its first line, and left."""
    left = server.total("request_success_total", finished_reason="abort")
    async with client(server) as http, http.stream("POST", COMPLETIONS, json=LONG) as response:
        lines = response.aiter_lines()  # which would close the answer if it went
        await anext(lines)
        begun = await harness.seconds_until(lambda: server.total("num_requests_running") == 1, SOON)
    ended = await harness.seconds_until(lambda: server.in_flight == 0, SOON)
    aborted = server.total("request_success_total", finished_reason="abort") - left
    kept = begun < math.inf and ended < math.inf and aborted == 1
    seen = f"ended after {ended:.1f} s"
    verdict.promise("a stream is read while it is computed, and its work ends with its client", kept, seen)


async def added(server: Cluster, rounds: int, seconds: float) -> dict[str, Any]:
    """The same requests to one replica and to a server without Ray, in turns: the medians of one request at a time, in
    milliseconds, and of what Ray adds to it; requests a second of eight clients."""
    with harness.served(*EXACT) as plain:
        latencies: dict[str, list[float]] = {"plain": [], "ray": []}
        rates: dict[str, list[float]] = {"plain": [], "ray": []}
        sides = [("plain", plain), ("ray", server)]
        for each in range(rounds):
            for name, side in sides[:: 1 if each % 2 else -1]:
                started = time.perf_counter()
                side.post(CHAT, chat(each)).raise_for_status()
                latencies[name].append(1000 * (time.perf_counter() - started))
        for _ in range(3):
            for name, side in sides:
                load = Load(side, [Case(CHAT, chat(each)) for each in range(8)], clients=8)
                async with load.running():
                    await asyncio.sleep(seconds)
                rates[name].append(load.outcomes["right"] / (load.requests[-1].ended - load.requests[0].began))
    more = [ray - own for ray, own in zip(latencies["ray"], latencies["plain"], strict=True)]
    return {
        "one_at_a_time_ms": {name: quantiles(values, 50, 95) for name, values in latencies.items()},
        "ray_adds_ms": round(statistics.median(more), 1),
        "requests_per_second": {name: round(statistics.median(values), 2) for name, values in rates.items()},
    }


async def run(minutes: float, clients: int, seed: int) -> int:
    """All of it."""
    verdict = Verdict("ray_serve")
    manifest = yaml.safe_load((ROOT / "deploy/ray/rayservice.yaml").read_text("utf-8"))
    taken = ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"]))
    verdict.promise("Serve takes the manifest's configuration", len(taken.applications) == 1, "it does")
    with tempfile.TemporaryDirectory() as name, cluster(Path(name)) as server:
        path = Path(name) / "next.yaml"
        await seconds_until(lambda: len(server.serving) == 2)
        load = Load(server, catalogue(2, seed, fates=(1, 0, 0)), clients, seed)
        await load.learn()
        load.cases = [*load.cases, *catalogue(1, seed + 1, fates=(0, 1, 1))]  # of which nothing is known before
        await kills(server, load, verdict, KILLS, 60 * minutes / (KILLS + 1), seed)
        verdict.figures["latency_seconds"] = quantiles(load.latencies, 50, 99)
        await dead_engine(server, load, verdict)
        await deployment(server, load, verdict, path, drain_seconds=1)
        await deployment(server, load, verdict, path, BROKEN_OFF, max_queue=200)
        await leaving(server, verdict)
        server.deploy(path, least=1, max_queue=200)
        for what, number, expected in (("2 to 1", 1, 1), ("1 to 2", clients, 2), ("2 to 1 again", 1, 1)):
            load.clients = number
            await until(server, load, verdict, f"{what} replicas", lambda n=expected: len(server.serving) == n)
        server.deploy(path, least=1, most=1, max_queue=200)
        load.clients = 4
        await kills(server, load, verdict, 1, 3, seed)
        verdict.figures |= await added(server, 40, 10.0)
        verdict.figures["outcomes"] = dict(sorted(load.outcomes.items()))
    return verdict.close()


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    arguments.add_argument("--minutes", type=float, default=10.0)
    arguments.add_argument("--clients", type=int, default=12)
    arguments.add_argument("--seed", type=int, default=0)
    sys.exit(asyncio.run(run(**vars(arguments.parse_args()))))

"""`python -m tests.faults.follow`: a slow, a failed and a poisoned request, each followed from what its client caught.

openai-python, with its own habits, sends three requests: one takes longer than the client waits, one meets a bug in the
worker, one kills every worker that runs it. Promised: the id in the client's hands is in the access line, in the
engine's lines and in the trace, the metrics count the failure by its route and status, and the poisoned request is
not sent again. Everything that was found is printed.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import openai
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.faults.faulty_worker import Fault
from tests.faults.harness import Server, Verdict, served
from tests.support.serving import wait_for
from tests.support.traces import collecting, spans_of

ROUTE = "/v1/chat/completions"
SLOW = {"max_tokens": 128, "extra_body": {"best_of": 16, "guidance": "entrgi", "diffusion": {"steps": 128}}}
KEY = "a-key-for-the-programs-own-use"


@dataclass
class Followed:
    """What was found of one request, by the id that its client had."""

    identity: str
    caught: Exception
    access: list[dict[str, Any]]
    engine: list[dict[str, Any]]
    counted: float
    spans: list[Span]

    def show(self) -> None:
        """Print it, the longest lists shortened."""
        print(f"  client   {type(self.caught).__name__}: {str(self.caught)[:160]}\n  id       {self.identity}")
        for name, lines in (("access", self.access), ("engine", self.engine)):
            for line in lines:
                print(f"  {name}   {json.dumps(line)[:900]}")
        print(f'  metric   entrgi:http_requests_total{{route="{ROUTE}"}} {self.counted:+g}')
        for span in self.spans[:12]:
            milliseconds = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e6
            attributes = {pair.key for pair in span.attributes}
            about = sorted(attributes & {"entrgi.request_id", "error.type", "entrgi.step"})
            print(f"  trace    {span.trace_id.hex()} {span.name:22} {milliseconds:9.1f} ms  {', '.join(about)}")
        print(f"           {len(self.spans)} spans in all")


def lines(server: Server) -> Iterator[dict[str, Any]]:
    """What the server has logged."""
    for line in server.log.read_text("utf-8").splitlines():
        if line.startswith("{"):
            yield json.loads(line)


def follow(
    server: Server, received: list[ExportTraceServiceRequest], status: int, seed: int, **options: Any
) -> Followed:
    """Send one request that will fail with this status, and look for its traces everywhere. `options` are openai's;
    a timeout among them means that the client, which gets no answer, names the request itself."""
    before = server.metric("http_requests_total", route=ROUTE, status=str(status))
    given = f"slow-{time.time_ns()}" if "timeout" in options else None
    headers = {"X-Request-Id": given} if given else {}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client:
        try:
            messages: Any = [{"role": "user", "content": "Write a short review of a hotel."}]
            client.with_options(max_retries=0 if given else 2).chat.completions.create(
                model="entrgi-demo-1.4m", messages=messages, seed=seed, extra_headers=headers, **options
            )
        except openai.APIError as error:
            caught = error
        else:
            raise RuntimeError("the request was answered")
    identity = given or str(getattr(caught, "request_id", None))

    def access() -> list[dict[str, Any]]:
        return [line for line in lines(server) if line["logger"] == "server.access" and line["request_id"] == identity]

    def spans() -> list[Span]:
        trace = access()[0]["trace_id"]
        return [span for span in spans_of(received) if span.trace_id.hex() == trace]

    wait_for(lambda: bool(access()))
    wait_for(lambda: any(span.name.startswith("POST") for span in spans()))
    engine = [line for line in lines(server) if line["logger"] != "server.access" and identity in json.dumps(line)]
    counted = server.metric("http_requests_total", route=ROUTE, status=str(status)) - before
    return Followed(identity, caught, access(), engine, counted, spans())


def judge(verdict: Verdict, name: str, found: Followed, code: str) -> None:
    """Print what was found, and promise that it belongs together."""
    print(f"\n{name}")
    found.show()
    line = found.access[0]
    verdict.promise(f"{name}: one access line, with the code", [line["error_code"]] == [code], line["error_code"])
    fields = {"completion_id", "guidance", "best_of", "queue_ms", "generation_ms", "key", "trace_id"}
    verdict.promise(f"{name}: the line tells what was asked and what it took", fields <= set(line), sorted(line))
    verdict.promise(f"{name}: no key", KEY not in json.dumps(line), line["key"])
    verdict.promise(f"{name}: the engine's lines name it", bool(found.engine), len(found.engine))
    verdict.promise(f"{name}: the metrics count it", found.counted >= 1, found.counted)
    ids = {pair.value.string_value for span in found.spans for pair in span.attributes if pair.key.endswith("_id")}
    verdict.promise(f"{name}: its trace has the id", found.identity in ids, len(found.spans))
    parts = {span.name for span in found.spans} & {"queue", "step", "model", "guidance", "reward"}
    verdict.promise(f"{name}: its trace has the steps' parts", {"queue", "step", "model"} <= parts, sorted(parts))


def run(server: Server, received: list[ExportTraceServiceRequest]) -> int:
    """The three requests and the verdict."""
    verdict = Verdict("follow")
    judge(verdict, "slow", follow(server, received, 499, 1, timeout=3.0, **SLOW), "client_closed_request")
    judge(verdict, "failed", follow(server, received, 500, Fault.RAISE), "internal_error")
    poisoned = follow(server, received, 503, Fault.DIE)
    judge(verdict, "poisoned", poisoned, "worker_lost")
    deaths = server.workers()[0]
    verdict.promise("poisoned: sent once, whatever the client's habits", poisoned.counted == 1, poisoned.counted)
    verdict.promise("poisoned: it cost two workers", deaths == 2, deaths)
    keys = re.findall(KEY, server.log.read_text("utf-8"))
    verdict.promise("the key stands nowhere in the log", not keys, len(keys))
    print()
    return verdict.close()


if __name__ == "__main__":
    os.environ["OTEL_BSP_SCHEDULE_DELAY"] = "200"  # milliseconds between two exports
    with collecting() as (endpoint, received):
        flags = ("--api-key", KEY, "--public-paths", "/metrics", "--otlp-endpoint", endpoint, "--spare-worker")
        with served(*flags, module="tests.faults.faulty_server") as server:
            sys.exit(run(server, received))

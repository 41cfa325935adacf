"""OpenTelemetry: spans of requests, waits and generations, read back from the SDK's memory exporter and, from a real
server process, by a collector that speaks OTLP over HTTP."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import httpx
import pytest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from server.api.telemetry import exporting_provider
from server.errors import ConfigurationError
from server.types import Job
from server.wire.messages import Event, Failed, Started, Timed
from tests.api.scripted_engine import ScriptedEngine, finished, make, open_client, script
from tests.support.serving import ROOT, Launch
from tests.support.traces import collecting, spans_of

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
SECRET = "the-secret-of-the-prompt"


@asynccontextmanager
async def traced(
    engine: ScriptedEngine | None = None, **settings: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, InMemorySpanExporter]]:
    """A client of an application, and what it has recorded."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    async with open_client(make(engine, tracer_provider=provider, **settings)) as client:
        yield client, exporter


def by_name(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


@pytest.mark.parametrize("stream", [False, True])
async def test_spans_of_a_request(stream: bool) -> None:
    body = {
        "prompt": SECRET, "suffix": SECRET, "stop": ["a-stop-string"], "max_tokens": 8, "temperature": 0.5, "seed": 11,
        "top_k": 5, "guidance": {"method": "entrgi", "gradient_steps": 2}, "best_of": 1, "stream": stream,
    }  # fmt: skip
    async with traced() as (client, exporter):
        response = await client.post("/v1/completions", json=body, headers={**TRACEPARENT, "X-Request-Id": "id-1"})
        assert response.status_code == 200
    found = by_name(exporter)
    assert set(found) == {"POST /v1/completions", "queue", "text_completion dlm"}
    request, queue, generation = found["POST /v1/completions"], found["queue"], found["text_completion dlm"]
    assert request.kind is SpanKind.SERVER
    assert f"{request.context.trace_id:032x}" == TRACE
    assert request.parent is not None
    assert f"{request.parent.span_id:016x}" == PARENT
    for child in (queue, generation):
        assert child.context.trace_id == request.context.trace_id
        assert child.parent is not None
        assert child.parent.span_id == request.context.span_id
    assert request.start_time <= queue.start_time <= queue.end_time == generation.start_time <= generation.end_time
    assert request.attributes is not None
    assert request.attributes["http.route"] == "/v1/completions"
    assert request.attributes["http.response.status_code"] == 200
    assert request.attributes["entrgi.request_id"] == "id-1"
    given = dict(generation.attributes or {})
    assert str(given.pop("gen_ai.response.id")).startswith("cmpl-")
    assert cast(int, given.pop("gen_ai.usage.input_tokens")) > 0
    groups: dict[str, dict[str, object]] = {
        "gen_ai": {"operation.name": "text_completion", "provider.name": "entrgi", "usage.output_tokens": 2},
        "gen_ai.request": {
            "model": "dlm", "choice.count": 1, "max_tokens": 8, "temperature": 0.5, "top_p": 0.95, "top_k": 5,
            "seed": 11, "stream": stream,
        },
        "gen_ai.response": {"model": "dlm", "finish_reasons": ("length",)},
        "entrgi": {"prompt_index": 0, "best_of": 1, "trajectory_tokens": 2, "model_calls": 2, "reward_calls": 0},
        "entrgi.diffusion": {"steps": 8, "algorithm": "entropy"},
        "entrgi.guidance": {"method": "entrgi", "reward_models": ("rm",), "gradient_steps": 2},
    }  # fmt: skip
    assert given == {f"{group}.{name}": told for group, names in groups.items() for name, told in names.items()}
    everything = "".join(span.to_json() for span in exporter.get_finished_spans())
    assert SECRET not in everything
    assert "a-stop-string" not in everything


async def test_spans_of_a_step_and_its_parts() -> None:
    async def timed(job: Job) -> AsyncIterator[Event]:
        yield Started(job.id)
        if job.timed:
            yield Timed(job.id, 3, 5, began=100.0, seconds=1.0, model=0.25, guidance=0.5, reward=0.375)
        yield finished(job)

    async with traced(ScriptedEngine(timed)) as (client, exporter):
        await client.post("/v1/completions", json={"prompt": "Hi"})
    found = by_name(exporter)
    assert found["step"].attributes == {"entrgi.step": 3, "entrgi.batch_trajectories": 5}
    parents = {"step": "text_completion dlm", "model": "step", "guidance": "step", "reward": "guidance"}
    for name, start, end in (("step", 0, 1), ("model", 0, 0.25), ("guidance", 0.25, 0.75), ("reward", 0.25, 0.625)):
        span, parent = found[name], found[parents[name]]
        assert (span.start_time, span.end_time) == (int((100 + start) * 1e9), int((100 + end) * 1e9))
        assert (span.parent and span.parent.span_id) == parent.context.span_id
    async with open_client(make(ScriptedEngine(timed))) as client:  # nobody is told of steps who does not ask
        assert (await client.post("/v1/completions", json={"prompt": "Hi"})).status_code == 200


async def test_every_prompt_has_its_spans_and_probes_have_none() -> None:
    async with traced(root_path="/llm") as (client, exporter):
        for path in ("/health", "/ready", "/ping", "/metrics", "/llm/health", "/llm/metrics"):
            assert (await client.get(path)).status_code == 200
        assert exporter.get_finished_spans() == ()
        await client.post("/v1/completions", json={"prompt": ["a", "b", "c"]})
    names = [span.name for span in exporter.get_finished_spans()]
    assert sorted(names) == ["POST /v1/completions", *["queue"] * 3, *["text_completion dlm"] * 3]
    indices = [s.attributes["entrgi.prompt_index"] for s in exporter.get_finished_spans() if s.attributes and s.parent]
    assert sorted(indices) == [0, 0, 1, 1, 2, 2]


async def test_a_failure_is_an_error_of_its_span() -> None:
    fails = script(Started(""), Failed("", "engine_failed", f"broke on {SECRET}"))
    async with traced(ScriptedEngine(fails)) as (client, exporter):
        body = {"messages": [{"role": "user", "content": SECRET}]}
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 500
        assert (await client.post("/v1/chat/completions", json={})).status_code == 400
    found = by_name(exporter)
    generation = found["chat dlm"]
    assert generation.status.status_code is StatusCode.ERROR
    assert generation.attributes is not None
    assert generation.attributes["error.type"] == "engine_failed"
    assert SECRET not in "".join(span.to_json() for span in exporter.get_finished_spans())
    attributes = [span.attributes or {} for span in exporter.get_finished_spans()]
    assert [each["http.response.status_code"] for each in attributes if "http.route" in each] == [500, 400]


async def test_nothing_is_traced_unless_configured() -> None:
    assert exporting_provider(None, {}) is None
    assert exporting_provider(None, {"OTEL_EXPORTER_OTLP_ENDPOINT": ""}) is None
    assert exporting_provider("http://127.0.0.1:1", {"OTEL_SDK_DISABLED": "true"}) is None
    assert exporting_provider("http://127.0.0.1:1", {"OTEL_TRACES_EXPORTER": "none"}) is None
    async with open_client(make()) as client:
        assert (await client.post("/v1/completions", json={"prompt": "Hi"}, headers=TRACEPARENT)).status_code == 200


def test_the_sdk_is_not_imported_unless_configured() -> None:
    code = (
        "import sys, server.cli, server.api.telemetry as t; assert t.exporting_provider(None, {}) is None; "
        "print([m for m in sys.modules if m.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_missing_sdk_is_refused_by_the_settings_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace.export", None)
    with pytest.raises(ConfigurationError, match=r"^otlp_endpoint: .*requirements-otel\.lock"):
        exporting_provider("http://127.0.0.1:4318", {})


def test_another_protocol_is_refused() -> None:
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        with pytest.raises(ConfigurationError, match=f"^{name}: "):
            exporting_provider("http://127.0.0.1:4317", {name: "grpc"})


# -- over the wire -----------------------------------------------------------------------------------------------


def value(of: AnyValue) -> object:
    return getattr(of, str(of.WhichOneof("value")))


def test_a_server_process_exports_to_a_collector(launch: Launch) -> None:
    with collecting() as (endpoint, received):
        served = launch("--otlp-endpoint", endpoint)
        served.wait_ready()
        answer = served.client.post("/v1/completions", json={"prompt": SECRET, "max_tokens": 8}, headers=TRACEPARENT)
        assert answer.status_code == 200
        assert served.stop() == 0  # sends what is left
    found = {span.name: span for span in spans_of(received)}
    assert set(found) == {"POST /v1/completions", "queue", "text_completion dlm", "step", "model"}
    assert {span.trace_id.hex() for span in found.values()} == {TRACE}
    generation = {pair.key: value(pair.value) for pair in found["text_completion dlm"].attributes}
    assert generation["gen_ai.usage.output_tokens"] == answer.json()["usage"]["completion_tokens"]
    resource = {pair.key: value(pair.value) for pair in received[0].resource_spans[0].resource.attributes}
    assert resource["service.name"] == "entrgi-server"
    assert SECRET.encode() not in b"".join(request.SerializeToString() for request in received)

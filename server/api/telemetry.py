"""OpenTelemetry traces, when a collector is configured; otherwise nothing here costs more than a call.

A request's span is FastAPI's own; it continues the client's trace (`traceparent`). Below it each prompt has two spans:
`queue`, until a worker begins, and one for the generation, with the attributes of OpenTelemetry's conventions for
generative AI and ours under `entrgi.`; below that, some of the denoising steps and their parts. No span holds text of a
prompt, of an answer or of a stop string.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastapi.telemetry import TelemetryConfig
from opentelemetry.context import Context
from opentelemetry.trace import Tracer, TracerProvider, set_span_in_context

from server import __version__
from server.api.convert import Plan
from server.api.middleware import probe_paths
from server.errors import ConfigurationError
from server.types import Job, JobResult
from server.wire.messages import Timed

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider as SdkTracerProvider

ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOL_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
PROTOCOL = "http/protobuf"
LAST_SPANS_SECONDS = 3.0
Attributes = dict[str, str | bool | int | float | list[str]]


def exporting_provider(endpoint: str | None, environment: Mapping[str, str] = os.environ) -> SdkTracerProvider | None:
    """Sends spans to `endpoint` (a collector's base URL, OTLP over HTTP), or to where OpenTelemetry's own variables
    say; None when neither names a collector. Nothing of the SDK is imported in that case. The caller shuts it down.
    Raises ConfigurationError when the SDK is not installed or another protocol is asked for."""
    if endpoint is None and not any(environment.get(name) for name in ENDPOINT_VARIABLES):
        return None
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true" or environment.get("OTEL_TRACES_EXPORTER") == "none":
        return None
    for name in PROTOCOL_VARIABLES:
        if environment.get(name, PROTOCOL) != PROTOCOL:
            raise ConfigurationError(f"{name}: traces are sent by {PROTOCOL} only, usually to port 4318")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider as SdkTracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigurationError("otlp_endpoint: the packages of requirements-otel.lock are not installed") from error
    exporter = OTLPSpanExporter(None if endpoint is None else f"{endpoint.rstrip('/')}/v1/traces")
    name = environment.get("OTEL_SERVICE_NAME") or "entrgi-server"
    resource = Resource.create({"service.name": name, "service.version": __version__})
    provider = SdkTracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def send_last_spans(provider: SdkTracerProvider) -> None:
    """Send what is left and shut the provider down; a collector that does not answer is not waited for."""
    sending = threading.Thread(target=provider.shutdown, name="last-spans", daemon=True)
    sending.start()
    sending.join(LAST_SPANS_SECONDS)


def fastapi_config(provider: TracerProvider | None, root_path: str) -> TelemetryConfig:
    """FastAPI's own telemetry: spans of requests other than probes, and nothing else."""
    probes = probe_paths(root_path)
    return {
        "tracing": provider is not None,
        "tracer_provider": provider,
        "metrics": False,
        "logs": False,
        "operation_spans": False,
        "auto_configure": False,
        "exclude": lambda scope: scope["path"] in probes,
    }


def step_spans(tracer: Tracer, generation: Context, times: Timed) -> None:
    """The spans of one denoising step and of its parts. Lengths are exact; a step that computes in several parts does
    `model` and `guidance` in turns, and both are shown in one piece."""
    attributes: Attributes = {"entrgi.step": times.step, "entrgi.batch_trajectories": times.trajectories}

    def span(name: str, parent: Context, start: float, seconds: float, attributes: Attributes | None = None) -> Context:
        made = tracer.start_span(name, parent, attributes=attributes, start_time=int(start * 1e9))
        made.end(int((start + seconds) * 1e9))
        return set_span_in_context(made)

    step = span("step", generation, times.began, times.seconds, attributes)
    span("model", step, times.began, times.model)
    if times.guidance:
        guidance = span("guidance", step, times.began + times.model, times.guidance)
        span("reward", guidance, times.began + times.model, times.reward)


def request_attributes(plan: Plan, job: Job, operation: str) -> Attributes:
    """Of the span of one prompt's generation, when it begins."""
    sampling, diffusion, guidance = job.sampling, job.diffusion, job.guidance
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "entrgi",
        "gen_ai.request.model": plan.model,
        "gen_ai.request.choice.count": sampling.n,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.seed": sampling.seed,
        "gen_ai.request.stream": plan.asked.stream,
        "gen_ai.response.id": plan.id,
        "gen_ai.response.model": plan.model,
        "entrgi.prompt_index": job.prompt_index,
        "entrgi.best_of": sampling.best_of,
        "entrgi.diffusion.steps": diffusion.steps,
        "entrgi.diffusion.algorithm": diffusion.algorithm,
        "entrgi.guidance.method": guidance.method,
        "gen_ai.request.top_k": sampling.top_k,
        "entrgi.guidance.reward_models": [weighted.model for weighted in guidance.rewards] or None,
        "entrgi.guidance.resample": guidance.resample and guidance.resample.by,
        "entrgi.guidance.gradient_steps": guidance.gradient_steps if guidance.uses_gradient else None,
    }
    return {name: value for name, value in attributes.items() if value is not None}


def response_attributes(job: Job, result: JobResult) -> Attributes:
    """Of the same span, when it ends with an answer."""
    chosen = [result.trajectories[index] for index in result.chosen]
    attributes: dict[str, Any] = {
        "gen_ai.usage.input_tokens": len(job.prompt_ids) + len(job.suffix_ids),
        "gen_ai.usage.output_tokens": sum(trajectory.completion_tokens for trajectory in chosen),
        "gen_ai.response.finish_reasons": [trajectory.finish_reason for trajectory in chosen],
        "entrgi.trajectory_tokens": sum(trajectory.completion_tokens for trajectory in result.trajectories),
        "entrgi.model_calls": result.model_calls,
        "entrgi.reward_calls": result.reward_calls,
        "entrgi.reward": chosen[0].reward,
    }
    return {name: value for name, value in attributes.items() if value is not None}

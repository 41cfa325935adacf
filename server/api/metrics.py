"""What `/metrics` exports. Names carry the prefix `entrgi:`; where the thing is the same as in vLLM, so are the
name's ending, the labels and the buckets.

One registry per application, so that two of them in one process (tests, replicas) do not collide. What the HTTP
process sees is counted here as it happens; what the workers count is asked of the engine at every scrape.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, TypeVar, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from server import __version__
from server.api.build import commit
from server.errors import BY_KIND, RequestError, ScorerUnavailable
from server.front.engine import Engine
from server.methods import METHODS
from server.scorers.calls import Reason
from server.wire.stats import Distribution, resident_bytes

PREFIX = "entrgi:"
MODEL = ("model_name",)
MODEL_METHOD = (*MODEL, "method")
WANT = (408, 429, 503)  # statuses of refusals for want of room, time or readiness
Kind = TypeVar("Kind", Counter, Gauge, Histogram)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# vLLM's buckets, in seconds; latencies and waits have finer ones below vLLM's least bound of 0.3 s.
FIRST_TOKEN_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
LATENCY_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0,
    40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
REWARD_BUCKETS = (
    -40.0, -30.0, -20.0, -15.0, -10.0, -7.5, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 7.5, 10.0,
    15.0, 20.0, 30.0, 40.0,
)  # fmt: skip

RENAMED = {"out_of_memory": "out_of_memory_batches"}
# By the names of fields of `RunnerStats`.
HELP = {
    "denoising_steps": "Denoising steps done, one for each trajectory in a step",
    "committed_tokens": "Canvas tokens revealed",
    "out_of_memory": "Denoising steps that ran out of memory and were done again in halves",
    "resamplings": "Times that trajectories of a prompt were copied over others of it",
    "model_forward_seconds": "Diffusion model forward of one denoising step",
    "guidance_seconds": "Reward guidance of one denoising step",
    "reward_forward_seconds": "Reward model forward passes of one denoising step",
    "reward_backward_seconds": "Reward model backward passes of one denoising step",
    "batch_trajectories": "Trajectories in a denoising step",
    "batch_rows": "Masked rows whose logits a denoising step computes",
    "effective_share": "Effective sample size of a prompt's trajectories when they meet, as a share of their number",
}


class Metrics:
    """The metrics of one application. Attributes are prometheus-client objects; `render` is the scrape. Without
    an engine they are of an application that passes requests on."""

    def __init__(self, engine: Engine | None = None) -> None:
        self.registry = CollectorRegistry()
        self._by_model: list[Counter | Gauge | Histogram] = []

        def made(kind: type[Kind], name: str, text: str, labels: Sequence[str] = MODEL, **options: Any) -> Kind:
            metric = kind(PREFIX + name, text, labels, registry=self.registry, **options)
            if labels == MODEL:
                self._by_model.append(metric)
            return metric

        self.requests_running = made(
            Gauge, "num_requests_running", "Prompts that a worker has begun, those that are parked among them"
        )
        self.requests_waiting = made(Gauge, "num_requests_waiting", "Prompts that wait for their first step")
        self.prompt_tokens = made(Counter, "prompt_tokens", "Prompt tokens of answered prompts")
        self.generation_tokens = made(Counter, "generation_tokens", "Tokens of all trajectories of answered prompts")
        text = "Prompts answered (abort: the client left)"
        self.request_success = made(Counter, "request_success", text, (*MODEL, "finished_reason"))
        text = "Until a prompt's first text can be sent"
        self.time_to_first_token = made(
            Histogram, "time_to_first_token_seconds", text, MODEL_METHOD, buckets=FIRST_TOKEN_BUCKETS
        )
        text = "From a prompt's arrival to its answer"
        self.e2e_latency = made(Histogram, "e2e_request_latency_seconds", text, MODEL_METHOD, buckets=LATENCY_BUCKETS)
        text = "From a prompt's arrival to its first step"
        self.queue_time = made(Histogram, "request_queue_time_seconds", text, buckets=LATENCY_BUCKETS)
        rewarded = ("reward_model", "method")
        text = "Prompts answered, by method; those of method none only where they were resampled"
        self.guided_requests = made(Counter, "guided_requests", text, ("method", "reward_model"))
        text = "Final reward of returned answers"
        self.final_reward = made(Histogram, "final_reward", text, rewarded, buckets=REWARD_BUCKETS)
        # A histogram of numbers below zero has no `_sum`: Prometheus takes sums to be counters. These two are.
        text = "Sum of the absolute final rewards of returned answers, by sign; positive minus negative is their sum"
        self.final_reward_size = made(Counter, "final_reward_size", text, (*rewarded, "sign"))
        text = "Requests refused for want of room, time or readiness"
        self.admission_rejections = made(Counter, "admission_rejections", text, ("reason",))
        text = "Requests by route and status; route other: none of ours, or refused before it was looked up"
        self.http_requests = made(Counter, "http_requests", text, ("route", "status"))
        self.batches = made(Gauge, "batches", "Batches by status", ("status",))
        text = "Lines of batches that were answered, or failed on their own"
        self.batch_lines = made(Counter, "batch_lines", text, ("status",))
        build = made(Gauge, "build_info", "Which code runs: always 1", ("version", "commit"))
        build.labels(__version__, commit()).set(1)
        if engine is not None:
            self.registry.register(_EngineCollector(engine))

    def observe_reward(self, reward_model: str, method: str, reward: float) -> None:
        """Count the final reward of one returned answer."""
        self.final_reward.labels(reward_model, method).observe(reward)
        for sign, size in (("positive", max(0.0, reward)), ("negative", max(0.0, -reward))):
            self.final_reward_size.labels(reward_model, method, sign).inc(size)

    def introduce(self, model_name: str) -> None:
        """Make the label `model_name` exist from the start, so that rates of counters begin at zero."""
        for metric in self._by_model:
            metric.labels(model_name)
        for method in METHODS:
            self.time_to_first_token.labels(model_name, method)
            self.e2e_latency.labels(model_name, method)
        self.http_requests.labels("other", "500")
        for status in ("completed", "failed"):
            self.batch_lines.labels(status)
            self.batches.labels(status)
        self.batches.labels("in_progress")
        for reason in ("stop", "length", "abort"):
            self.request_success.labels(model_name, reason)
        for error in BY_KIND.values():
            if _for_want(error):
                self.admission_rejections.labels(error.code)

    def refused(self, error: RequestError) -> None:
        """Count a refusal that is the server's state and not the request's fault."""
        if _for_want(type(error)):
            self.admission_rejections.labels(error.code or error.kind).inc()

    def render(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """What the engine's parts have counted, read when scraped."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """One family a number."""
        yield from self._of_workers()
        yield from self._of_scorers()

    def _of_workers(self) -> Iterator[Metric]:
        """The workers' numbers, sums over all of them."""
        engine = self._engine
        stats = engine.stats
        for name, text in HELP.items():
            value = getattr(stats, name)
            if isinstance(value, Distribution):
                family = HistogramMetricFamily(PREFIX + name, text)
                family.add_metric([], _cumulative(value), sum_value=value.total)
                yield family
            else:
                yield CounterMetricFamily(PREFIX + RENAMED.get(name, name), text, value=value)
        restarts = sum(replica.restarts for replica in engine.replicas)
        text = "Worker processes started after the first"
        yield CounterMetricFamily(PREFIX + "worker_restarts", text, value=restarts)
        text = "1 for a worker that can take work, else 0"
        ready = GaugeMetricFamily(PREFIX + "worker_ready", text, labels=["worker"])
        for replica in engine.replicas:
            ready.add_metric([str(replica.rank)], float(replica.ready))
        yield ready
        resident = GaugeMetricFamily(PREFIX + "resident_memory_bytes", "Memory of each process", labels=["process"])
        resident.add_metric(["http"], float(resident_bytes()))
        text = "Memory that a worker holds on its device: torch's on a GPU, all of the process's on a CPU"
        device = GaugeMetricFamily(PREFIX + "device_memory_bytes", text, labels=["worker"])
        for replica in engine.replicas:
            resident.add_metric([f"worker {replica.rank}"], float(replica.stats.resident_bytes))
            device.add_metric([str(replica.rank)], float(replica.stats.device_bytes))
        yield from (resident, device)
        if engine.ready:
            infos = [replica.info for replica in engine.replicas if replica.ready and replica.info]
            what = {
                "backend": ", ".join(sorted({info.kernel_backend for info in infos})),
                "device": ", ".join(dict.fromkeys(info.device for info in infos)),
                "dtype": engine.info.model.dtype,
            }
            backend = GaugeMetricFamily(PREFIX + "kernel_backend_info", "What computes: always 1", labels=list(what))
            backend.add_metric(list(what.values()), 1.0)
            yield backend
            text = "How a part of the work is done, and why where something is in the way: always 1"
            execution = GaugeMetricFamily(PREFIX + "execution_info", text, labels=["part", "model", "how", "why"])
            for way in dict.fromkeys(way for info in infos for way in info.ways):
                execution.add_metric([way.part, way.model, way.how, way.why], 1.0)
            yield execution

    def _of_scorers(self) -> Iterator[Metric]:
        """What was asked of outside scorers, with a value for each."""
        text = "Prompts whose outside scores are waited for"
        yield GaugeMetricFamily(PREFIX + "num_requests_parked", text, value=self._engine.parked)
        by = ["scorer"]
        counters = {
            "requests": CounterMetricFamily(PREFIX + "scorer_requests", "Requests to outside scorers", labels=by),
            "texts": CounterMetricFamily(PREFIX + "scorer_texts", "Texts in these requests", labels=by),
            "retries": CounterMetricFamily(PREFIX + "scorer_retries", "Calls of scorers made again", labels=by),
        }
        text = "Calls of outside scorers that failed; open: that were not made, since too many had failed"
        failures = CounterMetricFamily(PREFIX + "scorer_failures", text, labels=[*by, "reason"])
        seconds = HistogramMetricFamily(PREFIX + "scorer_seconds", "Answered calls of outside scorers", labels=by)
        text = "1 while a scorer is left alone because it failed, else 0"
        breakers = GaugeMetricFamily(PREFIX + "scorer_breaker_open", text, labels=by)
        for name, scorer in self._engine.scorers.items():
            for what, family in counters.items():
                family.add_metric([name], getattr(scorer.stats, what))
            for reason in (*get_args(Reason), "open"):
                failures.add_metric([name, reason], scorer.stats.failures[reason])
            seconds.add_metric([name], _cumulative(scorer.stats.seconds), sum_value=scorer.stats.seconds.total)
            breakers.add_metric([name], float(scorer.breaker.open))
        yield from (*counters.values(), failures, seconds, breakers)


def _for_want(error: type[RequestError]) -> bool:
    """Whether it is a refusal for want of room, time or readiness. A scorer that is left alone is no such want of the
    server's: it has metrics of its own."""
    return error.status in WANT and not issubclass(error, ScorerUnavailable)


def _cumulative(distribution: Distribution) -> list[tuple[str, float]]:
    """Prometheus's buckets count everything at or below their bound."""
    return list(zip((*map(repr, distribution.bounds), "+Inf"), accumulate(distribution.counts), strict=True))

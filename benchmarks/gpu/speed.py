"""Parts of `make gpu-check` that say how fast a device is."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import kernels
from benchmarks.checkpoints import Shape
from benchmarks.gpu import models
from benchmarks.gpu.estimate import LENGTH, estimate
from benchmarks.gpu.part import Given, Report
from benchmarks.memory import Meter
from benchmarks.reward_passes import Setup, measure_passes
from benchmarks.workload import Pair, Workload, engine_runner, load, run_to_end
from demo import bundled_model_path, bundled_reward_models
from kernels.recording import recorder
from server.errors import ConfigurationError
from server.guidance.assembly import Assembly
from server.guidance.plain import PlainLoop
from server.models.acceleration import accelerate, choose_attention, graph_trunk
from server.models.graphs import GraphedTrunk
from server.models.loading import LoadedDiffusionModel
from server.models.packing import PackedLayout
from server.rewards.graphs import GraphedPasses, graph_passes
from server.rewards.reward_model import RewardModel
from server.worker.memory import Footprint, cached_share, free_bytes

FRACTION = 0.8
"""`memory_fraction`'s default."""
REWARDS = ("1.7B", "0.6B", "4B")
TRAJECTORIES = (16, 4, 64)
WARM_STEPS, STEPS = 3, 5
BATCHES = {"1 x 228": [228], "4 x 200-260": [200, 220, 240, 260], "16 x 180-270": [180 + 6 * i for i in range(16)]}
PEAKED = 5.0
"""Times what logits of random weights are: they then spread about as a trained model's do."""
MASKED = 128
"""How many rows of each sequence are masked."""
WAYS = {
    "plain, sdpa": ("sdpa", False, False),
    "plain, varlen": ("varlen", False, False),
    "compile": ("auto", True, False),
    "graphs": ("auto", False, True),
}


class Clock:
    """Milliseconds by phase, of the device where there is one: an event before and after each call."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []
        self._depth = 0

    def now(self) -> Any:
        """This moment in the device's queue, or the host's seconds."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def timed(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        """The function; what it calls in its turn is counted as its own."""

        def run(*args: Any, **kwargs: Any) -> Any:
            begin, self._depth = self.now(), self._depth + 1
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self._spans.append((phase, begin, self.now()))

        return run

    def read(self) -> dict[str, float]:
        """The sums so far; waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
        sums: dict[str, float] = defaultdict(float)
        for phase, begin, end in self._spans:
            sums[phase] += begin.elapsed_time(end) if self._cuda else 1e3 * (end - begin)
        return dict(sums)


@contextmanager
def by_phase(loaded: LoadedDiffusionModel, reward: RewardModel, clock: Clock) -> Iterator[None]:
    """Time the parts of a step meanwhile."""
    calls: list[tuple[Any, str, str]] = [(loaded.model, "hidden", "diffusion"), (loaded.model, "head", "diffusion")]
    calls += [(Assembly, "read", "reward"), (reward, "extend", "reward"), (reward, "prefill_all", "reward")]
    calls += [(kernels, name, "vocabulary") for name in ("begin", "draw", "mix_into", "update", "filtered_stats")]
    with ExitStack() as stack:
        for owner, name, phase in calls:
            stack.enter_context(patch.object(owner, name, clock.timed(getattr(owner, name), phase)))
        yield


def step(given: Given) -> Report:
    """The engine on random weights of published sizes at the paper's settings: L = T = 128, M = 3, EntRGi."""
    until = time.monotonic() + 0.8 * given.seconds
    config = models.TINY_DREAM if given.tiny else models.DREAM
    shapes = models.TINY_REWARDS if given.tiny else {name: models.REWARDS[name] for name in REWARDS}
    dtype = torch.float32 if given.device.type == "cpu" else torch.bfloat16
    rows: list[Report] = []
    with tempfile.TemporaryDirectory() as folder:
        texts = models.Texts.of(Path(folder), config.vocab_size)
        loaded = models.diffusion_model(config, texts, given.device, dtype)
        loaded.model.lm_head.weight.mul_(PEAKED)
        for name, shape in shapes.items():
            vocabulary = {"vocab_size": config.vocab_size} if given.tiny else {}
            reward = models.reward_model(shape, loaded, given.device, dtype, **vocabulary)
            for graphs in (True, False) if given.device.type == "cuda" else (False,):
                why = _accelerated(loaded, reward, given.device, graphs)
                for count in (4,) if given.tiny else TRAJECTORIES:
                    if time.monotonic() > until:
                        return {"tables": {"Steps": rows}, "text": "no time for the rest"}
                    row = {"reward model": name, "trajectories": count, "graphs": why or ("on" if graphs else "off")}
                    rows.append(row | _measured(loaded, reward, count, config, shape))
    return {"tables": {"Steps": rows}}


def _accelerated(loaded: LoadedDiffusionModel, reward: RewardModel, device: torch.device, graphs: bool) -> str:
    """Set graphs as the server does; what is in the way of them."""
    loaded.model.trunk, reward.graphed_passes = loaded.model.plain_trunk, None
    accelerate(loaded.model, models.CONTEXT)
    return (graph_trunk(loaded.model) or graph_passes(reward)) if graphs else ""


def _measured(loaded: LoadedDiffusionModel, reward: RewardModel, count: int, config: Any, shape: Any) -> Report:
    """One row: a step's time, what of it is what, tokens/s beside the estimate, peak memory beside the budget."""
    device = loaded.model.device
    footprint = Footprint.of(loaded.model, [reward])
    free = free_bytes(device)
    runs = loaded.model.trunk, reward.graphed_passes
    graphed = [each.recorded for each in runs if isinstance(each, GraphedTrunk | GraphedPasses)]
    if reward.graphed_passes is not None:
        reward.graphed_passes.recorded.key_share = cached_share(reward)
    held = footprint.graph_tokens(free, FRACTION) if graphed else 0
    for graphs in graphed:
        graphs.most_tokens = held
    budgets = footprint.budgets(free, FRACTION, device.type, context_length=models.CONTEXT, graph_tokens=held)
    pair = Pair(loaded, reward, PlainLoop(loaded.model, loaded.tokenizer, loaded.info, {}), budgets)
    runner, meter, clock = engine_runner(pair), Meter(device), Clock(device)
    work = Workload(prompts=max(1, count // 4), best_of=min(4, count), max_tokens=LENGTH, steps=LENGTH)
    for job in work.jobs(pair):
        runner.add(job, now=time.time())
    for _ in range(WARM_STEPS):
        runner.step()
    before, started = meter.reset(), time.perf_counter()
    for _ in range(STEPS):
        runner.step()  # which ends with a wait for the device
    seconds = (time.perf_counter() - started) / STEPS
    peak = meter.peak() - before
    with by_phase(loaded, reward, clock):
        for _ in range(STEPS):
            runner.step()
    phases = {f"{phase} ms": milliseconds / STEPS for phase, milliseconds in clock.read().items()}
    first = LENGTH - WARM_STEPS
    expected = estimate(config, shape, count, masked=range(first - STEPS, first))
    return {
        "ms a step": 1e3 * seconds,
        **phases,
        "tokens/s": count / seconds,
        "estimated for an H100": expected.tokens_per_s,
        "its limit": expected.limit_tokens_per_s,
        "peak GB": peak / 1e9,
        "budget GB": free * FRACTION / 1e9,
    }


def waits(given: Given) -> Report:
    """How often the host waits for the device in a job of the bundled models, and where, by torch's own report."""
    pair = load(bundled_model_path(), next(iter(bundled_reward_models().values())), torch.bfloat16, given.device)
    runner, rows = engine_runner(pair), []
    for name in ("none", "entrgi"):
        length = 8 if given.tiny else 32
        work = Workload(method=name, prompts=1, max_tokens=length, steps=length)
        run_to_end(runner, work.jobs(pair))  # what is made on first use
        before = runner.stats.denoising_steps
        with warnings.catch_warnings(record=True) as caught, _synchronisations(given.device):
            warnings.simplefilter("always")
            run_to_end(runner, work.jobs(pair, 1))
        steps = (runner.stats.denoising_steps - before) // work.best_of
        at = Counter(
            f"{Path(w.filename).name}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)
        )
        rows.append({"method": name, "steps": steps, "waits": at.total(), "where": dict(at) or ""})
    return {"tables": {"Waits of a job": rows}}


@contextmanager
def _synchronisations(device: torch.device) -> Iterator[None]:
    """Have torch warn of each wait meanwhile."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def passes(given: Given) -> Report:
    """A reward model's passes with graphs and without, or why there are none."""
    setup = Setup(Shape(512, 64, 2, 4, 96), "float32", (4,), repeats=2) if given.tiny else Setup()
    if given.device.type == "cpu":
        return {"left_out": "there are no graphs on a CPU"}
    heads = setup.reward.hidden // setup.reward.heads
    backend = choose_attention("auto", given.device, getattr(torch, setup.dtype), heads)
    rows = measure_passes(given.device, setup, lambda model: GraphedPasses(model, recorder(given.device)), backend)
    return {"tables": {f"Milliseconds, {backend}": rows}}


def trunk(given: Given) -> Report:
    """Milliseconds of the diffusion model's blocks for each batch, or why a way cannot be taken."""
    config = models.TINY_DREAM if given.tiny else replace(models.DREAM, vocab_size=1024)
    dtype = torch.float32 if given.device.type == "cpu" else torch.bfloat16
    rows: list[Report] = []
    with tempfile.TemporaryDirectory() as folder:
        texts = models.Texts.of(Path(folder), 320)
        model = models.diffusion_model(config, texts, given.device, dtype).model
        for name, (attention, compiled, graphs) in WAYS.items():
            if given.tiny and (compiled or graphs):
                continue  # a compiler takes longer than all else
            model.trunk = model.plain_trunk
            try:
                accelerate(model, models.CONTEXT, attention, compiled=compiled)
                unfit = graph_trunk(model) if graphs else ""
            except ConfigurationError as error:
                unfit = str(error)
            if unfit:
                rows.append({"way": name, "attention": unfit})
                continue
            times = {batch: _milliseconds(model, lengths, given) for batch, lengths in BATCHES.items()}
            rows.append({"way": name, "attention": model.model.attention_backend} | times)
    return {"tables": {"Milliseconds of a forward": rows}}


@torch.no_grad()
def _milliseconds(model: Any, lengths: list[int], given: Given) -> float:
    """A forward's time as the caller sees it, packing included: the best of some."""
    tokens = torch.randint(0, model.vocab_size, (sum(lengths),), device=given.device)
    starts = torch.tensor([sum(lengths[:i]) for i in range(len(lengths))])
    rows = (starts[:, None] + torch.arange(MASKED)).flatten().to(given.device)
    times = []
    for _ in range(2 if given.tiny else 20):
        clock = Clock(given.device)
        clock.timed(lambda: model.hidden(tokens, PackedLayout.of(lengths, given.device), rows), "all")()
        times.append(clock.read()["all"])
    return min(times)

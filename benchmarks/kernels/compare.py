"""The comparison itself: every operation and a whole denoising step, research code against each backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import kernels
from benchmarks.kernels import measure, research
from kernels import roofline
from kernels.random import INNER_FINAL, row_keys

TAU, TOP_P, ETA = 0.7, 0.95, 0.5  # the paper's settings
OPERATIONS = ("row_stats", "draw", "filtered_stats", "mix", "update", "step")


@dataclass(frozen=True)
class Shape:
    """What is measured."""

    rows: int
    vocab_size: int
    hidden: int
    gradient_steps: int
    dtype: torch.dtype
    device: torch.device


@dataclass
class Measured:
    """One implementation's figures: operation -> seconds; peak bytes of a whole step."""

    name: str
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0


class Problem:
    """Random logits as wide as a diffusion model's, a table, and reward gradients."""

    def __init__(self, shape: Shape) -> None:
        g = torch.Generator().manual_seed(0)
        n, v, d = shape.rows, shape.vocab_size, shape.hidden
        self.shape = shape
        self.logits = torch.randn(n, v, generator=g).mul_(3).to(shape.device, shape.dtype)
        self.table = torch.randn(v, d, generator=g).mul_(0.02).to(shape.device, shape.dtype)
        compute = torch.float64 if shape.dtype == torch.float64 else torch.float32
        self.gs = [
            torch.randn(n, d, generator=g).mul_(0.01).to(shape.device, compute) for _ in range(shape.gradient_steps)
        ]

        def column(value: float) -> Tensor:
            return torch.full((n,), value, dtype=compute, device=shape.device)

        self.params = kernels.RowParams(
            tau=column(TAU),
            top_p=column(TOP_P),
            top_k=torch.full((n,), v, device=shape.device),
            greedy=torch.zeros(n, dtype=torch.bool, device=shape.device),
            eta=column(ETA),
        )
        self.position = torch.arange(n, device=shape.device)

    def keys(self, inner: int) -> Tensor:
        zero = torch.zeros_like(self.position)
        return row_keys(zero, zero, zero, zero, zero + inner, self.position)


def our_step(problem: Problem, backend: str | None) -> Tensor:
    """A whole denoising step without the reward model; the final tokens."""
    state = kernels.begin(problem.logits, problem.params, backend=backend, updates=len(problem.gs))
    log_v = math.log(problem.shape.vocab_size)
    for inner, g in enumerate(problem.gs):
        tokens = kernels.draw(state, problem.keys(inner))
        mixed = kernels.mix(state, problem.table, tokens, state.stats.entropy_1 / log_v)
        kernels.update(state, [kernels.Term(g, problem.table, mixed.soft)])
    return kernels.draw(state, problem.keys(INNER_FINAL))


def measure_research(problem: Problem, repeats: int) -> Measured:
    """The research code's sequence."""
    result = Measured("research code")
    g = problem.gs[0].to(problem.shape.dtype)
    gs = [x.to(problem.shape.dtype) for x in problem.gs]

    def timed(function: Callable[[], object]) -> float:
        return measure.seconds(function, problem.shape.device, repeats)

    step = research.ResearchStep(problem.logits, TAU, TOP_P, ETA)
    tokens = step.draw()
    result.seconds["row_stats"] = timed(step.row_stats)
    result.seconds["draw"] = timed(step.draw)
    result.seconds["filtered_stats"] = timed(lambda: step.filtered_stats(tokens))
    result.seconds["mix"] = timed(lambda: step.mix(problem.table, tokens))
    both = timed(lambda: step.update(step.mix(problem.table, tokens), g))
    result.seconds["update"] = max(both - result.seconds["mix"], 0.0)

    def whole() -> object:
        return research.run(problem.logits, problem.table, gs, TAU, TOP_P, ETA)

    result.seconds["step"] = timed(whole)
    result.peak_bytes = measure.peak_bytes(whole, problem.shape.device)
    return result


def measure_backend(problem: Problem, backend: str, repeats: int) -> Measured:
    """One of our backends. Updates are measured as the second of three, which keeps its gradient."""
    device = problem.shape.device
    result = Measured(backend)

    def begin() -> kernels.Guided:
        return kernels.begin(problem.logits, problem.params, backend=backend, updates=3)

    def timed(function: Callable[[], object]) -> float:
        return measure.seconds(function, device, repeats)

    state = begin()
    tokens = kernels.draw(state, problem.keys(0))
    w = state.stats.entropy_1
    soft = kernels.mix(state, problem.table, tokens, w).soft
    term = kernels.Term(problem.gs[0], problem.table, soft)
    kernels.update(state, [term])
    if backend != "reference":
        result.seconds["row_stats"] = timed(begin)
    else:
        result.seconds["row_stats"] = timed(lambda: begin().stats)
    result.seconds["draw"] = timed(lambda: kernels.draw(state, problem.keys(0)))
    result.seconds["filtered_stats"] = timed(lambda: kernels.filtered_stats(state, tokens))
    result.seconds["mix"] = timed(lambda: kernels.mix(state, problem.table, tokens, w))

    # Three updates, to leave each state whole; the mean of them. The pass that opens a state is taken off.
    def updates() -> None:
        fresh = begin()
        for _ in range(3):
            kernels.update(fresh, [term])

    result.seconds["update"] = max(timed(updates) - result.seconds["row_stats"], 0.0) / 3
    result.seconds["step"] = timed(lambda: our_step(problem, backend))
    result.peak_bytes = measure.peak_bytes(lambda: our_step(problem, backend), device)
    return result


def inner_seconds(problem: Problem, backend: str, repeats: int) -> float:
    """Time of an inner step's two products and what goes with them, a mix and an update, in the mean of three."""
    device, w = problem.shape.device, torch.full_like(problem.params.tau, 0.5)
    tokens = torch.zeros_like(problem.position)

    def steps(count: int) -> None:
        state = kernels.begin(problem.logits, problem.params, backend=backend, updates=3)
        for g in problem.gs[:count]:
            soft = kernels.mix(state, problem.table, tokens, w).soft
            kernels.update(state, [kernels.Term(g, problem.table, soft)])

    opening = measure.seconds(lambda: steps(0), device, repeats)
    return max(measure.seconds(lambda: steps(3), device, repeats) - opening, 0.0) / 3


def products(shape: Shape, repeats: int) -> dict[str, Any]:
    """Seconds of an inner step with fused and with library products on this GPU beside the estimate by which `kernels:
    auto` chooses, and which of the two is right here: fused where it takes at most `MARGIN` more. `shape` has three
    gradient steps."""
    problem = Problem(shape)
    measured = {name: inner_seconds(problem, backend, repeats) for name, backend in roofline.BACKENDS.items()}
    capability = torch.cuda.get_device_capability(shape.device)
    expected = roofline.estimate(capability, shape.vocab_size, [shape.hidden], shape.rows)
    found = roofline.Estimate(**measured)
    return {
        "shape": {"N": shape.rows, "V": shape.vocab_size, "D": shape.hidden},
        "measured": measured,
        "estimated": expected._asdict(),
        "auto_takes": expected.takes,
        "right_here": found.takes,
        "agrees": expected.takes == found.takes,
    }


def bytes_moved(shape: Shape) -> dict[str, int]:
    """The least that our implementations move through memory, by operation: passes over (N, V), and the table.

    phi is read from the logits and as many kept gradients as there have been updates; the middle of a step, one kept
    gradient, stands for an operation. Slabs between a product and its elementwise part stay in a cache.
    """
    passes = shape.rows * shape.vocab_size
    item = torch.finfo(shape.dtype).bits // 8
    table = shape.vocab_size * shape.hidden * item
    phi = passes * (item + 4)
    result = {
        "row_stats": passes * item,
        "draw": phi,
        "filtered_stats": 3 * phi,
        "mix": phi + table,
        "update": phi + 4 * passes + table,
    }
    m = shape.gradient_steps
    inner = sum(
        3 * passes * (item + 4 * min(t, 2)) + 4 * passes + 2 * table for t in range(m)
    )  # draw, mix and update read phi after t updates; an update writes one tensor
    result["step"] = passes * item + inner + passes * 4
    return result

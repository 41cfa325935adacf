"""The one gradient loop: M Adam steps on packed logits along the gradient of one or several reward models.

Rows (masked positions) of many trajectories, of any requests and any gradient method, are steered together; what
differs between rows is a number in a row: tau, top_p, top_k, eta and the weight w (algorithm.md, section 2). What the
reward models read is put together in `guidance.assembly`. Nothing in the loop waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

import kernels
from kernels.transfer import upload
from server.diffusion.schedule import Step
from server.guidance.assembly import Assembly, Objective, Responses, Timings
from server.methods import METHODS


@dataclass(frozen=True, slots=True)
class Steered:
    """Weighted rewards seen before each inner step, M tensors (B,); w at the first inner step, (N,)."""

    rewards: list[Tensor] = field(default_factory=list)
    first_w: Tensor | None = None


@dataclass(frozen=True)
class WeightedRows:
    """`methods.Rows` of N packed rows: what is the same for all rows of a trajectory is made only when a method asks.

    `owner` (N,) is each row's trajectory, `steps` the denoising step of each trajectory.
    """

    entropy_1: Tensor
    entropy_tau: Tensor
    vocab_size: int
    owner: Tensor
    steps: Sequence[Step]

    @cached_property
    def step(self) -> Tensor:
        """The step's number, (N,) int64."""
        return self.by_row(torch.tensor([step.index for step in self.steps]))

    @cached_property
    def time(self) -> Tensor:
        """t of the step, (N,), in the entropies' dtype."""
        return self.by_row(torch.tensor([step.time for step in self.steps], dtype=self.entropy_1.dtype))

    def by_row(self, values: Tensor) -> Tensor:
        """Values of the trajectories, on the host, as values of the rows."""
        return upload(values, self.owner.device)[self.owner]


def weights(methods: Sequence[str], rows: WeightedRows) -> Tensor:
    """w (N,) of every row by its trajectory's method."""
    present = sorted(set(methods))
    if len(present) == 1:
        return METHODS[present[0]].weigh(rows)
    codes = rows.by_row(torch.tensor([present.index(method) for method in methods]))
    w = torch.zeros_like(rows.entropy_1)
    for code, method in enumerate(present):
        w = torch.where(codes == code, METHODS[method].weigh(rows), w)
    return w


def steer(
    state: kernels.Guided,
    responses: Responses,
    objectives: Sequence[Objective],
    methods: Sequence[str],
    steps: Sequence[Step],
    keys: Callable[[int], Tensor],
    gradient_steps: int,
    *,
    first_step: int = 0,
    timings: Timings,
    read_after: bool = False,
) -> Steered:
    """Move `state` (N rows) M = `gradient_steps` times along the rewards' gradient, less the first `first_step` times,
    which were made before.

    `methods` and `steps` are each trajectory's method and denoising step; `keys(inner)` gives the random keys (N, 4) of
    an inner step. With `read_after` the reward is read once more at the end, so `rewards` has M + 1 entries.
    """
    responses, assemblies = Assembly.of(objectives, responses, state.logits.device)
    needs_draw = any(METHODS[method].draws for method in methods)
    steered_rewards: list[Tensor] = []
    first_w: Tensor | None = None
    for inner in range(first_step, gradient_steps + read_after):
        stats = state.stats
        w = weights(methods, WeightedRows(stats.entropy_1, stats.entropy_tau, state.vocab_size, responses.owner, steps))
        first_w = w if first_w is None else first_w
        hard = kernels.draw(state, keys(inner)) if needs_draw else stats.argmax
        # A masked position counts as EOS (or pad) when the argmax of the current, unfiltered phi says so.
        current = responses.committed.index_copy(0, responses.masked, stats.argmax)
        visible = responses.visible(current)
        terms: list[kernels.Term] = []
        total = torch.zeros(len(methods), dtype=w.dtype, device=w.device)
        last = inner == gradient_steps
        for assembly in assemblies:
            table, weight = assembly.objective.model.table, assembly.places.weights.to(w.dtype)
            whole = assembly.base.clone()
            soft = kernels.mix_into(state, table, hard, w, whole, assembly.places.place)
            rewards, g = assembly.read(whole, current, visible, timings, gradient=not last)
            total = total + weight * rewards.to(w.dtype)
            terms.append(kernels.Term(g * weight[responses.owner][:, None], table, soft))
        steered_rewards.append(total)
        if not last:
            kernels.update(state, terms)
    return Steered(steered_rewards, first_w)

"""Adam from fresh state, in closed form (Kingma and Ba, arXiv 1412.6980, algorithm 1), for a handful of steps.

Every denoising step starts Adam afresh, so after t updates the moments are fixed sums over the t gradients:

    m_hat = sum_i M[i] g_i,   v_hat = sum_i V[i] g_i^2,   M[i] = (1 - b1) b1^(t - i) / (1 - b1^t), V likewise with b2

Keeping g_1 and g_2 instead of (phi, m, v) saves a third of the memory for the usual three updates, and phi_1 and
phi_2 can be recomputed wherever they are read. From the third update on (`HISTORY` gradients are kept) the moments
themselves are the shorter description.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.ops import BETA_1, BETA_2, EPSILON

HISTORY = 2  # gradients that are kept before phi, m and v are written out


def raw_coefficients(t: int, beta: float) -> tuple[float, ...]:
    """Weights of g_1 .. g_t (or their squares) in Adam's moment after t updates, without bias correction."""
    return tuple((1 - beta) * beta ** (t - i) for i in range(1, t + 1))


def coefficients(t: int, beta: float) -> tuple[float, ...]:
    """The same, bias-corrected."""
    return tuple(c / (1 - beta**t) for c in raw_coefficients(t, beta))


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum of weights[i] * tensors[i]; a new tensor."""
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(tensor, alpha=weight)
    return total


def weighted_squares(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum of weights[i] * tensors[i]^2; a new tensor."""
    total = tensors[0].square().mul_(weights[0])
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.addcmul_(tensor, tensor, value=weight)
    return total


def direction(gradients: Sequence[Tensor]) -> Tensor:
    """m_hat / (sqrt(v_hat) + eps) after the last of `gradients`, oldest first; a new tensor."""
    t = len(gradients)
    if t == 1:
        return gradients[0] / gradients[0].abs().add_(EPSILON)
    scale = weighted_squares(gradients, coefficients(t, BETA_2)).sqrt_().add_(EPSILON)
    return weighted_sum(gradients, coefficients(t, BETA_1)).div_(scale)


def advance(m: Tensor, v: Tensor, gradient: Tensor, t: int) -> Tensor:
    """Plain Adam: updates m and v in place with the t-th gradient; m_hat / (sqrt(v_hat) + eps) as a new tensor."""
    m.mul_(BETA_1).add_(gradient, alpha=1 - BETA_1)
    v.mul_(BETA_2).addcmul_(gradient, gradient, value=1 - BETA_2)
    scale = (v / (1 - BETA_2**t)).sqrt_().add_(EPSILON)
    return (m / (1 - BETA_1**t)).div_(scale)


@dataclass
class Trail:
    """How phi_t is described after t updates: phi_0 plus at most two gradients, or phi itself with Adam's moments.

    `gradients` (0 to 2 tensors (N, V)) describe phi while `phi` is None; afterwards `phi` is the truth, with `m` and
    `v` unless no update will follow.
    """

    gradients: list[Tensor] = field(default_factory=list)
    phi: Tensor | None = None
    m: Tensor | None = None
    v: Tensor | None = None

    def part(self, rows: slice) -> Trail:
        """The trail of some rows; views."""
        phi, m, v = (None if tensor is None else tensor[rows] for tensor in (self.phi, self.m, self.v))
        return Trail([gradient[rows] for gradient in self.gradients], phi, m, v)


@dataclass(frozen=True)
class Plan:
    """Where one update writes: the gradient, or the new phi with or without moments. Outputs may alias what the
    trail holds, element for element: an update reads an element of everything before it writes one."""

    t: int
    gradient: Tensor | None = None
    phi: Tensor | None = None
    m: Tensor | None = None
    v: Tensor | None = None


def plan_update(trail: Trail, t: int, last: bool, dtype: torch.dtype, new: Callable[[], Tensor]) -> Plan:
    """What the t-th update writes. `new` makes an uninitialised (N, V) tensor; phi and the moments are in `dtype`,
    the gradients in whatever `new` makes.

    Allocates only what has no place yet: with three updates, the last of them known to be the last, two (N, V)
    tensors are all that ever lives.
    """
    if not last and t <= HISTORY:
        return Plan(t, gradient=new())
    free = [g for g in trail.gradients if g.dtype == dtype]

    def place(held: Tensor | None) -> Tensor:
        return held if held is not None else (free.pop(0) if free else new().to(dtype))

    if last:
        return Plan(t, phi=place(trail.phi))
    return Plan(t, m=place(trail.m), v=place(trail.v), phi=place(trail.phi))


def follow(trail: Trail, plan: Plan) -> Trail:
    """The trail after the update that `plan` described."""
    if plan.gradient is not None:
        return Trail(gradients=[*trail.gradients, plan.gradient])
    return Trail(phi=plan.phi, m=plan.m, v=plan.v)

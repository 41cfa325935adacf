"""Adam from fresh state, in closed form (Kingma and Ba, arXiv 1412.6980, algorithm 1), for a handful of steps.

Every denoising step starts Adam afresh, so after t updates the moments are fixed sums over the t gradients:

    m_hat = sum_i M[i] g_i,   v_hat = sum_i V[i] g_i^2,   M[i] = (1 - b1) b1^(t - i) / (1 - b1^t), V likewise with b2

Keeping g_1 and g_2 instead of (phi, m, v) saves a third of the memory for the usual three updates, and phi_1 and
phi_2 can be recomputed wherever they are read. From the third update on (`HISTORY` gradients are kept) the moments
themselves are the shorter description.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from kernels.ops import BETA_1, BETA_2, EPSILON

HISTORY = 2  # gradients that are kept before phi, m and v are written out


def coefficients(t: int, beta: float, corrected: bool = True) -> tuple[float, ...]:
    """Weights of g_1 .. g_t (or their squares) in Adam's moment after t updates, with or without bias correction."""
    raw = ((1 - beta) * beta ** (t - i) for i in range(1, t + 1))
    return tuple(c / (1 - beta**t) if corrected else c for c in raw)


def moments(gradients: Sequence[Tensor], corrected: bool) -> tuple[Tensor, Tensor]:
    """Adam's m and v after the last of `gradients`, oldest first; new tensors."""
    first, *others = gradients
    of_m, of_v = (coefficients(len(gradients), beta, corrected) for beta in (BETA_1, BETA_2))
    m, v = first * of_m[0], first.square().mul_(of_v[0])
    for gradient, in_m, in_v in zip(others, of_m[1:], of_v[1:], strict=True):
        m.add_(gradient, alpha=in_m)
        v.addcmul_(gradient, gradient, value=in_v)
    return m, v


def direction(gradients: Sequence[Tensor]) -> Tensor:
    """m_hat / (sqrt(v_hat) + eps) after the last of `gradients`, oldest first; a new tensor."""
    if len(gradients) == 1:
        return gradients[0] / gradients[0].abs().add_(EPSILON)
    m, v = moments(gradients, corrected=True)
    return m.div_(v.sqrt_().add_(EPSILON))


def advance(m: Tensor, v: Tensor, gradient: Tensor, t: int) -> Tensor:
    """Plain Adam: updates m and v in place with the t-th gradient; m_hat / (sqrt(v_hat) + eps) as a new tensor."""
    m.mul_(BETA_1).add_(gradient, alpha=1 - BETA_1)
    v.mul_(BETA_2).addcmul_(gradient, gradient, value=1 - BETA_2)
    scale = (v / (1 - BETA_2**t)).sqrt_().add_(EPSILON)
    return (m / (1 - BETA_1**t)).div_(scale)


class Trail(NamedTuple):
    """How phi_t is described after t updates: phi_0 plus at most two gradients, or phi itself with Adam's moments.

    `gradients` (0 to 2 tensors (N, V)) describe phi while `phi` is None; afterwards `phi` is the truth, with `m` and
    `v` unless no update will follow.
    """

    gradients: tuple[Tensor, ...] = ()
    phi: Tensor | None = None
    m: Tensor | None = None
    v: Tensor | None = None

    @property
    def newest(self) -> Tensor | None:
        """The last gradient, where gradients describe phi."""
        return self.gradients[-1] if self.gradients else None

    def part(self, rows: slice) -> Trail:
        """The trail of some rows; views."""
        held = (None if tensor is None else tensor[rows] for tensor in self[1:])
        return Trail(tuple(gradient[rows] for gradient in self.gradients), *held)

    def after(self, t: int, last: bool, new: Callable[[], Tensor]) -> Trail:
        """The trail after the t-th update, which writes `newest`, or phi with or without moments. `new` makes an
        uninitialised (N, V) tensor.

        Allocates only what has no place yet: with three updates, the last of them known to be the last, two (N, V)
        tensors are all that ever lives. So outputs may alias what this trail holds, element for element: an update
        reads an element of everything before it writes one.
        """
        if not last and t <= HISTORY:
            return Trail((*self.gradients, new()))
        free = list(self.gradients)

        def place(held: Tensor | None) -> Tensor:
            return held if held is not None else free.pop(0) if free else new()

        if last:
            return Trail(phi=place(self.phi))
        m, v = place(self.m), place(self.v)
        return Trail(phi=place(self.phi), m=m, v=v)

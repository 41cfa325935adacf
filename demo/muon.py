"""Muon (Jordan et al., 2024) in float32: momentum, orthogonalised by Newton-Schulz, for the matrices of the blocks.

torch ships a Muon that iterates in bfloat16, which is slow on processors without bfloat16 units. Matrices of one
shape are iterated as one batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalised(matrices: Tensor) -> Tensor:
    """(B, m, n) with m <= n -> nearly orthogonal matrices of the same singular vectors (quintic Newton-Schulz)."""
    a, b, c = COEFFICIENTS
    x: Tensor = matrices / (matrices.flatten(1).norm(dim=1).view(-1, 1, 1) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class Muon:
    """Steps 2-d parameters from gradients that it is handed. Updates are scaled to AdamW's usual size (0.2 RMS)."""

    def __init__(self, parameters: Sequence[Tensor], momentum: float, weight_decay: float) -> None:
        self.momentum = momentum
        self.weight_decay = weight_decay
        groups: dict[tuple[int, ...], list[Tensor]] = {}
        for parameter in parameters:
            groups.setdefault(tuple(sorted(parameter.shape)), []).append(parameter)
        self.groups = list(groups.values())
        self.velocity = [torch.zeros(len(group), *sorted(group[0].shape)) for group in self.groups]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update with learning rate `rate` from the parameters' `.grad`."""
        for group, velocity in zip(self.groups, self.velocity, strict=True):
            gradients = torch.stack([_wide(p.grad) for p in group if p.grad is not None])
            velocity.mul_(self.momentum).add_(gradients)
            update = orthogonalised(gradients + self.momentum * velocity)  # Nesterov
            scale = 0.2 * max(velocity.shape[1:]) ** 0.5
            for parameter, direction in zip(group, update, strict=True):
                parameter.mul_(1 - rate * self.weight_decay)
                wide = parameter.shape[0] <= parameter.shape[1]
                parameter.add_(direction if wide else direction.T, alpha=-rate * scale)


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T

"""The research code's sequence of torch operations, transcribed from algorithm.md: what the kernels are compared with.

One denoising step: M times (softmax, entropy with 1e-10 inside the logarithm, top-p filter by a full sort, a
multinomial draw, the mix, autograd back to phi, torch.optim.Adam), then the final filtered draw and the confidence.
The reward model is left out on both sides: its gradient dr/de is given. Nothing here is used outside the bench.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def top_p_filter(z: Tensor, top_p: float) -> Tensor:
    """z (N, V) with -inf outside the nucleus, by sorting every row."""
    ordered, index = torch.sort(z, descending=True)
    cumulative = torch.cumsum(torch.softmax(ordered, dim=-1), dim=-1)
    remove = cumulative > top_p
    remove[..., 1:] = remove[..., :-1].clone()
    remove[..., 0] = False
    mask = torch.zeros_like(z, dtype=torch.bool).scatter_(-1, index, remove)
    return z.masked_fill(mask, torch.finfo(z.dtype).min)


def entropy(logits: Tensor) -> Tensor:
    """(N,) in nats."""
    p = torch.softmax(logits, dim=-1)
    return -(p * torch.log(p + 1e-10)).sum(-1)


def sample(phi: Tensor, tau: float, top_p: float) -> Tensor:
    """One token a row, (N,)."""
    p = torch.softmax(top_p_filter(phi / tau, top_p), dim=-1)
    return torch.multinomial(p, 1)[:, 0]


class ResearchStep:
    """phi, the optimiser and the five operations; each method is what the matching operation of `kernels` replaces."""

    def __init__(self, logits: Tensor, tau: float, top_p: float, eta: float) -> None:
        self.tau, self.top_p = tau, top_p
        self.phi = logits.detach().clone().requires_grad_()
        self.optimizer = torch.optim.Adam([self.phi], lr=eta, maximize=True)

    @torch.no_grad()
    def row_stats(self) -> tuple[Tensor, Tensor, Tensor]:
        """Entropy at temperature 1 and at tau, and the argmax."""
        return entropy(self.phi), entropy(self.phi / self.tau), self.phi.argmax(-1)

    @torch.no_grad()
    def draw(self) -> Tensor:
        """Tokens (N,)."""
        return sample(self.phi, self.tau, self.top_p)

    @torch.no_grad()
    def filtered_stats(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Confidences of the filtered distribution."""
        p = torch.softmax(top_p_filter(self.phi / self.tau, self.top_p), dim=-1)
        top = torch.sort(p, dim=-1, descending=True).values
        negative = (p * torch.log(p + 1e-10)).sum(-1)
        return negative, p.gather(-1, tokens[:, None])[:, 0], top[:, 0] - top[:, 1]

    def mix(self, table: Tensor, tokens: Tensor) -> Tensor:
        """e (N, D), attached to phi."""
        soft = torch.softmax(self.phi / self.tau, dim=-1) @ table
        with torch.no_grad():
            w = entropy(self.phi) / math.log(self.phi.shape[-1])
            shift = w[:, None] * (table[tokens] - soft)
        return soft + shift

    def update(self, embeds: Tensor, g: Tensor) -> None:
        """Autograd back to phi, and Adam."""
        self.optimizer.zero_grad()
        (self.phi.grad,) = torch.autograd.grad(embeds, [self.phi], g)
        self.optimizer.step()


def run(
    logits: Tensor, table: Tensor, gs: Sequence[Tensor], tau: float, top_p: float, eta: float
) -> tuple[Tensor, Tensor]:
    """A whole denoising step without the reward model; the final tokens and their confidence, (N,) each."""
    confidence = -entropy(logits / tau)
    step = ResearchStep(logits, tau, top_p, eta)
    for g in gs:
        embeds = step.mix(table, step.draw())
        step.update(embeds, g)
    return step.draw(), confidence

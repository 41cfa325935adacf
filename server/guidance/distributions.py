"""What the plain loop draws from, as algorithm.md writes it: the nucleus by sorting, one token a row by rejection."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.random import MAX_REJECTIONS, uniform
from server.diffusion.schedule import Step


class PlainRows(NamedTuple):
    """What a method's weight sees of one trajectory's rows (`methods.Rows`)."""

    entropy_1: Tensor
    entropy_tau: Tensor
    vocab_size: int
    step: Tensor
    time: Tensor


def filtered_distribution(phi: Tensor, temperature: float, top_p: float, top_k: int | None) -> tuple[Tensor, Tensor]:
    """(unfiltered, filtered) distributions of section 1.4, each (N, V); the kept tokens are where the second is > 0.

    Temperature 0 divides by nothing. top_p keeps a token when the mass ranked before it is at most p, top_k keeps the
    k largest; equal values: the lower id ranks first.
    """
    q = torch.softmax(phi / (temperature or 1.0), dim=-1)
    order = torch.sort(phi, dim=-1, descending=True, stable=True).indices
    ranked = q.gather(-1, order)
    before = ranked.cumsum(-1) - ranked
    keep = before <= top_p
    if top_k is not None:
        keep[:, top_k:] = False
    kept = torch.zeros_like(keep).scatter(-1, order, keep)
    filtered = torch.where(kept, q, torch.zeros_like(q))
    return q, filtered / filtered.sum(-1, keepdim=True)


def draw(phi: Tensor, q: Tensor, filtered: Tensor, keys: Tensor, *, greedy: bool, never: int | None = None) -> Tensor:
    """One token a row (section 1.4): rejection from the unfiltered q until the filters keep it; (N,) int64. The id
    `never` is rejected too: greedy rows, and those whose filters keep nothing else, take the best other token."""
    if never is not None:
        other = torch.arange(phi.shape[-1], device=phi.device) != never
        phi, filtered = phi.masked_fill(~other, -torch.inf), filtered * other
    kept = filtered > 0
    tokens = phi.argmax(-1)
    pending = (kept.sum(-1) > 1) & (not greedy)
    cumulative = q.cumsum(-1)
    for round_ in range(MAX_REJECTIONS):
        if not pending.any():
            return tokens
        x = torch.searchsorted(cumulative, uniform(keys, round_).to(q)[:, None], right=True)[:, 0]
        x = x.clamp_max(q.shape[-1] - 1)
        accepted = pending & kept.gather(-1, x[:, None])[:, 0]
        tokens = torch.where(accepted, x, tokens)
        pending = pending & ~accepted
    if pending.any():
        u = uniform(keys, MAX_REJECTIONS).to(q)[:, None]
        cumulative = filtered.cumsum(-1)
        x = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)[:, 0].clamp_max(q.shape[-1] - 1)
        tokens = torch.where(pending, x, tokens)
    return tokens


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of softmax(logits), (N,)."""
    logp = torch.log_softmax(logits, dim=-1)
    return -(logp.exp() * logp).sum(-1)


def weighted_rows(phi: Tensor, tau: float, step: Step) -> PlainRows:
    """The rows of phi (N, V) in a denoising step."""
    entropy_1 = entropy(phi)
    step_of_rows = torch.full_like(entropy_1, step.index, dtype=torch.int64)
    return PlainRows(entropy_1, entropy(phi / tau), phi.shape[-1], step_of_rows, torch.full_like(entropy_1, step.time))

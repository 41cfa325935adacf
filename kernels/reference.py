"""The specification: every operation in plain torch, as the paper and algorithm.md write it.

Slow on purpose, and exact in float64: it sorts, materialises every (N, V) tensor it names, and keeps Adam's moments
as torch.optim.Adam does. Every other backend is tested against it. Two things are stated here that the paper leaves
open. Ranking is by value, largest first, and among equal values the lower id first. Masses are accumulated in
float64 whatever the logits' dtype, since in bfloat16 the cumulative sum of a flat row stalls below top_p.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from kernels.ops import BETA_1, BETA_2, EPSILON, FilteredStats, Guided, Mixed, RowParams, RowStats, Term
from kernels.random import MAX_REJECTIONS, uniform


def row_stats(phi: Tensor, tau: Tensor) -> RowStats:
    """phi (N, V), tau (N,). Entropies are those of the exact distribution (no epsilon inside the logarithm)."""

    def entropy(z: Tensor) -> Tensor:
        result: Tensor = torch.special.entr(torch.softmax(z, dim=-1)).sum(-1)
        return result

    z = phi / tau[:, None]
    return RowStats(phi.logsumexp(-1), z.logsumexp(-1), entropy(phi), entropy(z), phi.argmax(-1))


def kept_tokens(phi: Tensor, params: RowParams) -> Tensor:
    """Which tokens the filters of algorithm.md 1.4 keep, (N, V) bool.

    top_p keeps a token when the mass of the tokens ranked before it is at most top_p, so the first is always kept and
    so is the one that crosses; then top_k keeps the k first of these. With both, that is the shorter of two prefixes.
    """
    order = torch.sort(phi, dim=-1, descending=True, stable=True).indices
    q = torch.softmax(phi.double() / params.tau.double()[:, None], dim=-1).gather(-1, order)
    before = q.cumsum(-1) - q
    top_p = params.top_p.double()[:, None]
    rank = torch.arange(phi.shape[-1], device=phi.device)
    keep = ((before <= top_p) | (top_p >= 1) | (rank == 0)) & (rank < params.top_k[:, None])
    return torch.zeros_like(keep).scatter(-1, order, keep)


def best(phi: Tensor, never: int | None) -> Tensor:
    """The lowest id of the largest value beside `never` in each row of phi (N, V), (N,) int64."""
    if never is None:
        return phi.argmax(-1)
    place = torch.cat([phi[:, :never], phi[:, never + 1 :]], dim=-1).argmax(-1)
    return place + (place >= never)


def draw(phi: Tensor, params: RowParams, keys: Tensor, never: int | None = None, kept: Tensor | None = None) -> Tensor:
    """One token a row, (N,) int64, by the rejection rule of algorithm.md 1.4; phi (N, V), keys (N, 4). `kept` is what
    `kept_tokens` gives, where it is known.

    Round r draws the first id whose cumulative unfiltered probability exceeds u_r and accepts it when the filters
    keep it and it is not `never`. After 64 rejections, u_64 draws from the ids that can be accepted. A greedy row,
    and one of which the filters keep nothing but `never`, takes the best other token.
    """
    kept = kept_tokens(phi, params) if kept is None else kept
    if never is not None:
        kept[:, never] = False
    weights = torch.softmax(phi.double() / params.tau.double()[:, None], dim=-1)
    tokens = best(phi, never)
    pending = ~params.greedy & (kept.sum(-1) > 1)
    cumulative = weights.cumsum(-1)
    for round_ in range(MAX_REJECTIONS):
        if not pending.any():
            return tokens
        x = first_exceeding(cumulative, uniform(keys, round_))
        accepted = pending & kept.gather(-1, x[:, None])[:, 0]
        tokens = torch.where(accepted, x, tokens)
        pending = pending & ~accepted
    # Relative to the best of them, whose weight is 1: what `never` leaves to the others may be too small for a number.
    z = (phi.double() - phi.double().gather(-1, tokens[:, None])) / params.tau.double()[:, None]
    cumulative = z.masked_fill(~kept, -torch.inf).nan_to_num(-torch.inf, posinf=-torch.inf).exp().cumsum(-1)
    pending &= cumulative[:, -1] > 0
    return torch.where(pending, first_exceeding(cumulative, uniform(keys, MAX_REJECTIONS)), tokens)


def first_exceeding(cumulative: Tensor, u: Tensor) -> Tensor:
    """The first id (N,) whose entry in `cumulative` (N, V) exceeds u (N,) times the row's total."""
    total = cumulative[:, -1:]
    # u * total can round up to the total itself; the largest smaller number then picks the last id with any mass.
    target = torch.minimum(u[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_max(cumulative.shape[-1] - 1)


def filtered_stats(phi: Tensor, params: RowParams, tokens: Tensor) -> FilteredStats:
    """Statistics of softmax(filter(phi / tau)); phi (N, V), tokens (N,)."""
    z = (phi / params.tau[:, None]).masked_fill(~kept_tokens(phi, params), -torch.inf)
    p = torch.softmax(z, dim=-1)
    top = p.topk(2, dim=-1).values if p.shape[-1] > 1 else torch.nn.functional.pad(p, (0, 1))
    return FilteredStats(
        neg_entropy=-torch.special.entr(p).sum(-1),
        token_probability=p.gather(-1, tokens[:, None])[:, 0],
        margin=top[:, 0] - top[:, 1],
    )


class ReferenceState(Guided):
    """phi and Adam's two moments as full (N, V) tensors in the compute dtype."""

    backend = "reference"

    def __init__(self, logits: Tensor, params: RowParams, updates: int | None) -> None:
        super().__init__(logits, params, updates)
        self._current = self.logits.to(self.dtype)
        self.stats = row_stats(self._current, self.params.tau)
        self._m = torch.zeros((), dtype=self.dtype, device=logits.device)
        self._v = torch.zeros((), dtype=self.dtype, device=logits.device)

    def _part(self, rows: slice) -> Self:
        part = super()._part(rows)
        part._current = self._current[rows]
        part.stats = row_stats(part._current, part.params.tau)
        if self.updates:
            part._m, part._v = self._m[rows], self._v[rows]
        return part

    def phi(self) -> Tensor:
        return self._current

    def _draw(self, keys: Tensor, rows: Tensor | None, never: int | None) -> Tensor:
        some = slice(None) if rows is None else rows
        return draw(self._current[some], self.params.select(some), keys, never)

    def _filtered_stats(self, tokens: Tensor, rows: Tensor | None) -> FilteredStats:
        some = slice(None) if rows is None else rows
        return filtered_stats(self._current[some], self.params.select(some), tokens)

    def _mix(self, table: Tensor, tokens: Tensor, w: Tensor) -> Mixed:
        q = torch.softmax(self._current / self.params.tau[:, None], dim=-1)
        soft = q @ table.to(self.dtype)
        hard = table[tokens].to(self.dtype)
        return Mixed(embeds=soft + w.to(self.dtype)[:, None] * (hard - soft), soft=soft)

    def _update(self, terms: Sequence[Term]) -> None:
        phi, params = self._current, self.params
        q = torch.softmax(phi / params.tau[:, None], dim=-1)
        slope = torch.zeros_like(phi)  # d reward / d q, up to a constant a row
        offset = torch.zeros_like(params.tau)  # its mean under q
        for term in terms:
            g = term.g.to(self.dtype)
            slope = slope + g @ term.table.to(self.dtype).T
            offset = offset + (g * term.soft.to(self.dtype)).sum(-1)
        gradient = q * (slope - offset[:, None]) / params.tau[:, None]

        t = self.updates + 1
        self._m = BETA_1 * self._m + (1 - BETA_1) * gradient
        self._v = BETA_2 * self._v + (1 - BETA_2) * gradient.square()
        m_hat = self._m / (1 - BETA_1**t)
        v_hat = self._v / (1 - BETA_2**t)
        self._current = phi + params.eta[:, None] * m_hat / (v_hat.sqrt() + EPSILON)
        self.stats = row_stats(self._current, params.tau)

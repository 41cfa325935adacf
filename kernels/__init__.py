"""Guidance kernels: entropy, drawing, embedding mixing and the gradient step on packed logits.

    state = kernels.begin(logits, params)                    # (N, V) logits, one row a masked position
    for inner in range(M):
        tokens = kernels.draw(state, keys(inner))            # x ~ softmax(filter(phi / tau))
        mixed = kernels.mix(state, table, tokens, w)         # e = soft + w (hard - soft)
        g = ...                                              # dr/de from the reward model
        kernels.update(state, [kernels.Term(g, table, mixed.soft)])   # one Adam step on phi
    tokens = kernels.draw(state, keys(INNER_FINAL))

The formulas are those of docs/algorithm.md. `kernels.reference` is the specification in plain torch; every other
implementation computes the same without a sort and without most of the (N, V) temporaries. This package knows
nothing of models, requests or servers, and imports triton only when a triton kernel is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.dispatch import available_backends, choose, default_backend, state_class
from kernels.ops import FilteredStats, Guided, Mixed, RowParams, RowStats, Term
from kernels.settings import BACKENDS

__all__ = [
    "BACKENDS",
    "FilteredStats",
    "Guided",
    "Mixed",
    "RowParams",
    "RowStats",
    "Term",
    "available_backends",
    "begin",
    "default_backend",
    "draw",
    "filtered_stats",
    "mix",
    "mix_into",
    "update",
]


@torch.no_grad()
def begin(logits: Tensor, params: RowParams, *, backend: str | None = None, updates: int | None = None) -> Guided:
    """Opens a denoising step: phi_0 = logits (N, V), fresh Adam state.

    `backend` None chooses by device and dtype, else one of `BACKENDS`. `updates` is how many calls of `update` will
    follow, if known: the last of them then keeps no moments. The logits must not change while the state lives.
    Raises ValueError for shapes that do not fit, an unknown backend, or one that cannot run here.
    """
    return state_class(backend or choose(logits.device, logits.dtype))(logits, params, updates)


@torch.no_grad()
def draw(state: Guided, keys: Tensor, rows: Tensor | None = None, *, never: int | None = None) -> Tensor:
    """One token a row from softmax(filter(phi / tau)), (n,) int64 (algorithm.md 1.4); the argmax for greedy rows.

    `rows` (n,) int64 names a subset; `keys` (n, 4) int64 has one key a drawn row (`kernels.random.row_keys`). The id
    `never` is rejected as a filtered token is: greedy rows, and rows whose filters keep nothing else, take the best
    other token. The distribution that is drawn from, and every statistic, is the one without this rule. ValueError
    where the vocabulary lacks the id or has no other.
    """
    if never is not None and not (0 <= never < state.vocab_size > 1):
        raise ValueError(f"never is {never}, which must be one id of several below {state.vocab_size}")
    if keys.shape != (_count(state, rows), 4):
        raise ValueError(f"keys must be ({_count(state, rows)}, 4), not {tuple(keys.shape)}")
    return state._draw(keys, rows, never)


@torch.no_grad()
def filtered_stats(state: Guided, tokens: Tensor, rows: Tensor | None = None) -> FilteredStats:
    """Entropy, the given tokens' probability and the top-two margin of softmax(filter(phi / tau)), each (n,)."""
    if tokens.shape != (_count(state, rows),):
        raise ValueError(f"tokens must be ({_count(state, rows)},), not {tuple(tokens.shape)}")
    return state._filtered_stats(tokens, rows)


@torch.no_grad()
def mix(state: Guided, table: Tensor, tokens: Tensor, w: Tensor) -> Mixed:
    """What the reward model reads at masked positions, both (N, D) in the compute dtype, outside autograd:

    soft = softmax(phi / tau) @ table;  embeds = soft + w (table[tokens] - soft)    with table (V, D), tokens and w (N,)
    """
    if table.ndim != 2 or table.shape[0] != state.vocab_size:
        raise ValueError(f"table must be ({state.vocab_size}, D), not {tuple(table.shape)}")
    if tokens.shape != (state.rows,) or w.shape != (state.rows,):
        raise ValueError(f"tokens and w must be ({state.rows},), not {tuple(tokens.shape)} and {tuple(w.shape)}")
    return state._mix(table.detach(), tokens, w)


@torch.no_grad()
def mix_into(state: Guided, table: Tensor, tokens: Tensor, w: Tensor, out: Tensor, place: Tensor) -> Tensor:
    """`mix`, whose embeds go where the reward model reads them: row i to out[place[i]], in the dtype of `out` (S, D).
    Places (N,) int64 differ, but for -1: what the last row of `out` then holds is nobody's. Returns soft (N, D)."""
    if place.shape != (state.rows,) or out.shape[1:] != table.shape[1:]:
        raise ValueError(f"place must be ({state.rows},), and out of the table's width")
    return state._mix_into(table.detach(), tokens, w, out, place)


@torch.no_grad()
def update(state: Guided, terms: Sequence[Term]) -> None:
    """One Adam step (betas .9 / .999, eps 1e-8, bias-corrected, rate eta) that moves phi up the gradient

    dr/dphi = (1 / tau) q (sum of g @ table.T - sum of dot(g, soft)),    q = softmax(phi / tau)
    """
    if not terms:
        raise ValueError("an update needs at least one term")
    for term in terms:
        shape = (state.rows, term.table.shape[-1])
        if term.table.shape[0] != state.vocab_size or term.g.shape != shape or term.soft.shape != shape:
            raise ValueError(f"a term must hold g and soft {shape} and a table ({state.vocab_size}, D)")
    if state.expected_updates is not None and state.updates >= state.expected_updates:
        raise ValueError(f"begin() was told of {state.expected_updates} updates only")
    state._update(terms)
    state.updates += 1


def _count(state: Guided, rows: Tensor | None) -> int:
    """How many rows are meant; ValueError for anything but None and a one-dimensional int64 tensor."""
    if rows is not None and (rows.ndim != 1 or rows.dtype != torch.long):
        raise ValueError("rows must be a one-dimensional int64 tensor")
    return state.rows if rows is None else len(rows)

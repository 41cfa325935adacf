"""Every form of every pass, once, so that Triton compiles nothing while somebody waits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import kernels
from kernels.dispatch import choose
from kernels.random import row_keys

UPDATES = (1, 2, 3, 5)
"""Numbers of gradient steps that reach every description of phi (`kernels.adam.Trail`) and all that an update may
write: gradients up to the second, phi after the last, moments from the third on where more follow."""
ROWS = 16


@torch.no_grad()
def warm_up(
    backend: str | None, dtype: torch.dtype, vocab_size: int, device: torch.device, tables: Sequence[Tensor]
) -> None:
    """Where the backend (None: that which runs when none is named) is one of Triton's, make denoising steps of random
    logits of this width: unguided ones, and with each of the reward models' tables (V, D) by itself and with all of
    them; of all rows and of some; whole, and after splits, where a row is in the middle of what was allocated.

    A form is compiled for a kernel's constants, dtypes, and what is known of V, D and strides; the number of rows makes
    no difference (`kernels.gpu.common.kernel`).
    """
    backend = backend or choose(device, dtype)
    if backend not in ("triton", "fused"):
        return
    sets = [[table] for table in tables] + ([list(tables)] if len(tables) > 1 else [])
    for some in sets or [[]]:
        for updates in UPDATES if some else (0,):
            _run(backend, torch.randn(ROWS, vocab_size, device=device).to(dtype), some, updates)


def _run(backend: str, logits: Tensor, tables: Sequence[Tensor], updates: int) -> None:
    column = torch.ones(ROWS, device=logits.device)
    everything = torch.full_like(column, logits.shape[1]).long()
    params = kernels.RowParams(column, column / 2, everything, column > 1, column)
    state = kernels.begin(logits, params, backend=backend, updates=updates)
    for update in range(updates + 1):
        position = torch.arange(state.rows, device=logits.device)
        zero = torch.zeros_like(position)
        keys = row_keys(zero, zero, zero, zero, zero, position)
        for rows in (None, position):
            tokens = kernels.draw(state, keys, rows, never=0)
            kernels.filtered_stats(state, tokens, rows)
        terms = []
        for table in tables:
            embeds = table.new_empty(state.rows, table.shape[1])
            kernels.mix_into(state, table, tokens, column[: state.rows], embeds, position)
            soft = kernels.mix(state, table, tokens, column[: state.rows]).soft
            terms.append(kernels.Term(embeds.float(), table, soft))
        if update < updates:
            kernels.update(state, terms)
            state = state.split(1)[1]

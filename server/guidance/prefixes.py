"""Cached reward prefixes that grow with the answer: revealed tokens at the front never change again.

Up to the first masked position a response is settled, so its keys and values in the reward model are too. They are
computed once and put behind the conversation's; the M passes of every later step, forward and back, begin at the first
masked position. Exact: a row over the longer prefix reads the same reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from kernels.transfer import upload
from server.rewards.reward_model import Prefix, RewardModel, RewardRows

IntArray = npt.NDArray[np.int64]

GROW_BY = 8
"""Settled positions that are worth a forward of their own: rows of unlike length cost the attention some padding."""


@dataclass(frozen=True, slots=True)
class RewardContext:
    """What one reward model reads around the response of one job, and how much of the response is settled.

    `prefix` is cached; `lead_ids` follow it uncached (none, unless the cache is turned off); then comes the response,
    the first `settled` places of which are in the prefix, and the template's closing `suffix_ids`. The response's place
    i has position `start` + i.
    """

    prefix: Prefix
    suffix_ids: tuple[int, ...]
    lead_ids: tuple[int, ...]
    start: int
    settled: int

    @classmethod
    def of(cls, prefix: Prefix, suffix_ids: Sequence[int], lead_ids: Sequence[int] = ()) -> RewardContext:
        """Around a response of which nothing is settled."""
        return cls(prefix, tuple(suffix_ids), tuple(lead_ids), prefix.length + len(lead_ids), 0)


def grow(
    model: RewardModel,
    contexts: Sequence[RewardContext],
    canvases: Sequence[IntArray],
    settled: Sequence[int],
    eos_token_id: int,
    pad_token_id: int,
) -> list[RewardContext]:
    """The contexts of B trajectories with their settled tokens behind the prefix, where `GROW_BY` have come together.

    `canvases` are the response tokens (L,), the first `settled` of each revealed. Padding, and what lies behind an EOS,
    is hidden from the reward model and left out, as in a pass over the response.
    """
    grown = list(contexts)
    rows: list[int] = []
    places: list[IntArray] = []
    for index, (context, canvas, stop) in enumerate(zip(contexts, canvases, settled, strict=True)):
        if context.lead_ids or stop - context.settled < GROW_BY:
            continue
        grown[index] = replace(context, settled=stop)
        ends = np.flatnonzero(canvas[:stop] == eos_token_id)
        last = stop if len(ends) == 0 else int(ends[0]) + 1
        new = np.arange(context.settled, last)
        new = new[canvas[new] != pad_token_id]
        if len(new):
            rows.append(index)
            places.append(new)
    if not rows:
        return grown
    tokens = np.concatenate([canvases[index][new] for index, new in zip(rows, places, strict=True)])
    positions = np.concatenate([contexts[index].start + new for index, new in zip(rows, places, strict=True)])
    device = model.table.device
    extended = model.extend(
        RewardRows(
            tuple(contexts[index].prefix for index in rows),
            tuple(len(new) for new in places),
            upload(torch.from_numpy(positions), device),
        ),
        model.table[upload(torch.from_numpy(tokens), device)],
    )
    for index, prefix in zip(rows, extended, strict=True):
        grown[index] = replace(grown[index], prefix=prefix)
    return grown

"""Cached reward prefixes that grow with the answer: revealed tokens at the front never change again.

Up to the first masked position a response is settled, so its keys and values in the reward model are too. They are
computed once and put after the conversation's; the M passes of every later step, forward and back, begin at the first
masked position. Exact: a row over the longer prefix reads the same reward.

A reward model is read at a row's last token that is not its padding. Where the template closes a response with padding
or with nothing, that token may be one of the response or of the conversation. So that every row has one whatever is
hidden, the last such token of what is settled is then left out of the prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from kernels.transfer import upload_all
from server.diffusion.sampler import IntArray
from server.models.packing import PackedLayout, Prefix
from server.rewards.reward_model import RewardModel

GROW_BY = 8
"""Settled positions that are worth a forward of their own: rows of unlike length cost the attention some padding."""


@dataclass(frozen=True, slots=True)
class RewardContext:
    """What one reward model reads around the response of one job, and how much of the response is settled.

    `prefix` is cached; `lead_ids` follow it uncached; then comes the response, the first `settled` places of which are
    in the prefix, and the template's closing `suffix_ids`. The response's place i has position `start` + i.
    """

    prefix: Prefix
    suffix_ids: tuple[int, ...]
    lead_ids: tuple[int, ...]
    start: int
    settled: int

    @classmethod
    def of(
        cls, model: RewardModel, around: Sequence[tuple[Sequence[int], Sequence[int]]], *, cached: bool = True
    ) -> list[RewardContext]:
        """Around responses of which nothing is settled, each between the template's tokens before and after it; with
        `cached` the former are run now, all together, and kept."""
        kept = []
        for before, after in around:
            count = len(before) if cached else 0
            kept.append(count if model.content(after) else min(count, max(0, model.content(before) - 1)))
        prefixes = model.prefill_all([before[:count] for (before, _), count in zip(around, kept, strict=True)])
        return [
            cls(prefix, tuple(after), tuple(before[count:]), len(before), 0)
            for prefix, (before, after), count in zip(prefixes, around, kept, strict=True)
        ]


def grow(
    model: RewardModel,
    contexts: Sequence[RewardContext],
    canvases: Sequence[IntArray],
    settled: Sequence[int],
    eos_token_id: int,
    pad_token_id: int,
) -> list[RewardContext]:
    """The contexts of B trajectories with their settled tokens after the prefix, where `GROW_BY` have come together.

    `canvases` are the response tokens (L,), the first `settled` of each revealed. Padding, and what lies after an EOS,
    is hidden from the reward model and left out, as in a pass over the response. Contexts without a cached prefix stay
    as they are.
    """
    grown = list(contexts)
    rows: list[int] = []
    places: list[IntArray] = []
    for index, (context, canvas, stop) in enumerate(zip(contexts, canvases, settled, strict=True)):
        if not context.prefix.length or stop - context.settled < GROW_BY:
            continue
        ends = np.flatnonzero(canvas[:stop] == eos_token_id)
        last = stop if len(ends) == 0 else int(ends[0]) + 1
        new = np.arange(context.settled, last)
        new = new[canvas[new] != pad_token_id]
        if not model.content(context.suffix_ids):
            content = new[~model.padding_on_host[canvas[new]]]
            if len(content) == 0 or content[-1] - context.settled < GROW_BY:
                continue
            stop = int(content[-1])
            new = new[new < stop]
        grown[index] = replace(context, settled=stop, lead_ids=())
        if len(new) or context.lead_ids:
            rows.append(index)
            places.append(new)
    if not rows:
        return grown
    device = model.table.device
    lengths, positions, tokens = [], [], []
    lead_ids: list[int] = []
    for index, new in zip(rows, places, strict=True):
        context, lead = contexts[index], len(contexts[index].lead_ids)
        lengths.append(lead + len(new))
        positions.append(np.concatenate([np.arange(context.start - lead, context.start), context.start + new]))
        tokens.append(np.concatenate([np.full(lead, -1), canvases[index][new]]))
        lead_ids += context.lead_ids
    ids = np.concatenate(tokens)
    layout = PackedLayout.of(
        lengths,
        prefixes=[contexts[index].prefix for index in rows],
        positions=torch.from_numpy(np.concatenate(positions)),
        causal=True,
    )
    known, around = torch.from_numpy(ids.clip(0)), torch.from_numpy(np.flatnonzero(ids < 0))
    things = [known, around, torch.tensor(lead_ids, dtype=torch.long)]
    if model.device == device:
        known, around, leads, layout = upload_all([*things, layout], device)
    else:
        known, around, leads = upload_all(things, device)
        (layout,) = upload_all([layout], model.device)
    embeds = model.table[known]
    if lead_ids:
        embeds.index_copy_(0, around, model.own_embeddings(leads).to(device))
    for index, prefix in zip(rows, model.extend(layout, embeds), strict=True):
        grown[index] = replace(grown[index], prefix=prefix)
    return grown

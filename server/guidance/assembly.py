"""What a reward model reads in a pass of the gradient loop: packed tokens of many trajectories, most of them fixed.

The reward model runs on packed ragged sequences: nothing is padded, response positions behind an EOS are not computed
at all (position ids keep counting across them), and the part before the response comes from a prefix cache.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.guidance.prefixes import RewardContext
from server.rewards.reward_model import RewardModel, RewardRows


@dataclass(frozen=True, slots=True)
class Objective:
    """One reward model, its context for each of B trajectories, and its weight in each one's objective, (B,)."""

    model: RewardModel
    contexts: tuple[RewardContext, ...]
    weights: Tensor


@dataclass(frozen=True, slots=True)
class Responses:
    """The responses of B trajectories, packed one after another (R = sum of their lengths).

    `committed` (R,) int64 holds revealed tokens (anything where masked); `row` (R,) int64 is the logits row of a
    masked position and -1 elsewhere. Rows of the logits are in this order: `owner` (N,) is each row's trajectory.
    """

    lengths: tuple[int, ...]
    committed: Tensor
    row: Tensor
    owner: Tensor


@dataclass(slots=True)
class Timings:
    """Seconds spent inside the loop, for metrics."""

    reward_forward_seconds: float = 0.0
    reward_backward_seconds: float = 0.0
    reward_calls: int = 0


class Assembly:
    """Where every packed reward-model token of one objective comes from; fixed for a denoising step.

    The packed order is: for each trajectory what leads, its response from the first place that is not settled on, then
    its suffix.
    """

    def __init__(self, objective: Objective, responses: Responses) -> None:
        device = responses.committed.device
        self.objective = objective
        table = objective.model.table
        response, row, position, owner, pieces = [], [], [], [], []
        start = 0
        for index, (length, context) in enumerate(zip(responses.lengths, objective.contexts, strict=True)):
            lead, tail = len(context.lead_ids), len(context.suffix_ids)
            own = slice(start + context.settled, start + length)
            nowhere = torch.full((lead + tail,), -1, device=device)
            row += [nowhere[:lead], responses.row[own], nowhere[lead:]]
            response += [torch.full((lead,), -1), torch.arange(own.start, own.stop), torch.full((tail,), -1)]
            first = context.start
            position += [
                torch.arange(first - lead, first),
                torch.arange(first + context.settled, first + length + tail),
            ]
            owner.append(torch.full((lead + length - context.settled + tail,), index))
            if lead:
                pieces.append(_own_embeddings(objective.model, context.lead_ids))
            pieces.append(table[responses.committed[own]])
            pieces.append(_own_embeddings(objective.model, context.suffix_ids))
            start += length
        self.response = torch.cat(response).to(device)
        self.row = torch.cat(row)
        self.position = torch.cat(position).to(device)
        self.owner = torch.cat(owner).to(device)
        self.base = torch.cat(pieces)

    def read(self, embeds: Tensor, visible: Tensor, timings: Timings, *, gradient: bool) -> tuple[Tensor, Tensor]:
        """Unweighted rewards (B,) and dr/de (N, D) with masked positions entering as `embeds` (N, D).

        `visible` (R,) bool hides response positions. The gradient is zeros when not asked for.
        """
        model = self.objective.model
        seen = (self.response < 0) | visible[self.response.clamp_min(0)]
        selected = torch.nonzero(seen)[:, 0]
        row = self.row[selected]
        masked = torch.nonzero(row >= 0)[:, 0]
        x = self.base[selected].index_copy(0, masked, embeds[row[masked]].to(self.base.dtype))
        lengths = torch.bincount(self.owner[selected], minlength=len(self.objective.contexts)).tolist()
        rows = RewardRows(
            prefixes=tuple(context.prefix for context in self.objective.contexts),
            lengths=tuple(lengths),
            positions=self.position[selected],
        )
        g = torch.zeros_like(embeds)
        started = time.perf_counter()
        with torch.enable_grad() if gradient else torch.no_grad():
            x.requires_grad_(gradient)
            rewards = model.forward(rows, x)
            total = rewards.sum()
        forwarded = time.perf_counter()
        if gradient:
            (g_x,) = torch.autograd.grad(total, [x])
            g.index_copy_(0, row[masked], g_x[masked].to(g.dtype))
        timings.reward_forward_seconds += forwarded - started
        timings.reward_backward_seconds += time.perf_counter() - forwarded
        timings.reward_calls += 1
        return rewards.detach(), g


def _own_embeddings(model: RewardModel, ids: Sequence[int]) -> Tensor:
    """Of reward-vocabulary ids, beside the table."""
    return model.own_embeddings(torch.tensor(ids, dtype=torch.long)).to(model.table.device)

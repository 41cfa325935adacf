"""The one gradient loop: M Adam steps on packed logits along the gradient of one or several reward models.

Rows (masked positions) of many trajectories, of any requests and any gradient method, are steered together; what
differs between rows is a number in a row: tau, top_p, top_k, eta and the weight w (algorithm.md, section 2). The
reward model runs on packed ragged sequences: nothing is padded, response positions behind an EOS are not computed at
all (position ids keep counting across them), and the part before the response comes from a prefix cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import kernels
from server.guidance.methods import WEIGHTS, draws_hard_tokens
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


@dataclass(frozen=True, slots=True)
class Steered:
    """Weighted rewards seen before each inner step, M tensors (B,); w at the first inner step, (N,); the terms of the
    last update where it was left to the caller."""

    rewards: list[Tensor] = field(default_factory=list)
    first_w: Tensor | None = None
    pending: list[kernels.Term] = field(default_factory=list)


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


def visible_positions(tokens: Tensor, lengths: Sequence[int], eos_token_id: int, pad_token_id: int) -> Tensor:
    """Which packed response positions (R,) the reward model sees: none behind a trajectory's first EOS, none that holds
    the pad token. Segment-wise cumulative sums; no loop over positions."""
    ended = (tokens == eos_token_id).long()
    before = ended.cumsum(0) - ended
    sizes = torch.tensor(list(lengths), device=tokens.device)
    starts = sizes.cumsum(0) - sizes
    at_start = torch.repeat_interleave(before[starts], sizes, output_size=len(tokens))
    return (before == at_start) & (tokens != pad_token_id)


def weights(methods: Sequence[str], owner: Tensor, entropy: Tensor, vocab_size: int) -> Tensor:
    """w (N,) of every row by its trajectory's method."""
    present = sorted(set(methods))
    if len(present) == 1:
        return WEIGHTS[present[0]](entropy, vocab_size)
    codes = torch.tensor([present.index(method) for method in methods], device=owner.device)[owner]
    w = torch.zeros_like(entropy)
    for code, method in enumerate(present):
        w = torch.where(codes == code, WEIGHTS[method](entropy, vocab_size), w)
    return w


def steer(
    state: kernels.Guided,
    responses: Responses,
    objectives: Sequence[Objective],
    methods: Sequence[str],
    keys: Callable[[int], Tensor],
    gradient_steps: int,
    *,
    eos_token_id: int,
    pad_token_id: int,
    timings: Timings,
    finish: bool = True,
    read_after: bool = False,
) -> Steered:
    """Move `state` (N rows) M = `gradient_steps` times along the rewards' gradient.

    `methods` names each trajectory's method; `keys(inner)` gives the random keys (N, 4) of an inner step. With
    `read_after` the reward is read once more at the end, so `rewards` has M + 1 entries. Without `finish` the last
    update is not made but returned as `pending`, so that the caller can make it for the rows it needs.
    """
    masked = torch.nonzero(responses.row >= 0)[:, 0]
    assemblies = [Assembly(objective, responses) for objective in objectives]
    needs_draw = any(draws_hard_tokens(method) for method in methods)
    steered_rewards: list[Tensor] = []
    first_w: Tensor | None = None
    terms: list[kernels.Term] = []
    for inner in range(gradient_steps + read_after):
        stats = state.stats
        w = weights(methods, responses.owner, stats.entropy_1, state.vocab_size)
        first_w = w if first_w is None else first_w
        hard = kernels.draw(state, keys(inner)) if needs_draw else stats.argmax
        # A masked position counts as EOS (or pad) when the argmax of the current, unfiltered phi says so.
        current = responses.committed.index_copy(0, masked, stats.argmax[responses.row[masked]])
        visible = visible_positions(current, responses.lengths, eos_token_id, pad_token_id)
        terms = []
        total = torch.zeros(len(methods), dtype=w.dtype, device=w.device)
        last = inner == gradient_steps
        for assembly in assemblies:
            objective = assembly.objective
            mixed = kernels.mix(state, objective.model.table, hard, w)
            rewards, g = assembly.read(mixed.embeds, visible, timings, gradient=not last)
            weight = objective.weights.to(w.dtype)
            total = total + weight * rewards.to(w.dtype)
            terms.append(kernels.Term(g * weight[responses.owner][:, None], objective.model.table, mixed.soft))
        steered_rewards.append(total)
        if inner < gradient_steps - 1 or (finish and not last):
            kernels.update(state, terms)
    return Steered(steered_rewards, first_w, [] if finish else terms)

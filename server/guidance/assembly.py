"""What a reward model reads in a pass of the gradient loop: packed tokens of many trajectories, most of them fixed.

The reward model runs on packed ragged sequences: nothing is padded, response positions behind an EOS (hidden ones) are
not seen (position ids keep counting across them), and the part before the response comes from a prefix cache.

Which positions are hidden follows from the logits, so in each pass only the device knows it at first. Two ways:

* `HiddenLeftOut` asks the device and runs the tokens that are seen, not one more. On a CPU asking costs nothing.
* `HiddenBehind` never asks, so that a GPU always has its next work queued. Each row keeps its length; hidden tokens
  are moved behind the row's seen ones, where causality hides them, and the row is read at its last seen token. They are
  computed for nothing, and their gradients are exactly zero. It takes an attention that reads lengths from the device.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.transfer import upload
from server.guidance.prefixes import RewardContext
from server.rewards.reward_model import Packing, RewardModel

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Objective:
    """One reward model, its context for each of B trajectories, and its weight in each one's objective, (B,)."""

    model: RewardModel
    contexts: tuple[RewardContext, ...]
    weights: Tensor


@dataclass(frozen=True, slots=True)
class Responses:
    """The responses of B trajectories, packed one after another (R = sum of their lengths), of which N positions are
    masked, one a row of the logits. All int64 but for `hidden`.

    `committed` (R,) holds revealed tokens (anything where masked); `first` (R,) is the packed position at which the
    same response begins. `masked` (N,) is the packed position of each row, ascending, and `owner` (N,) its trajectory.
    On the host: `places`, which are the same as `masked`, and `hidden` (R,), positions that revealed tokens hide from
    reward models whatever becomes of the masked ones.
    """

    lengths: tuple[int, ...]
    committed: Tensor
    first: Tensor
    masked: Tensor
    owner: Tensor
    places: IntArray
    hidden: BoolArray

    @classmethod
    def of(
        cls,
        canvases: Sequence[IntArray],
        positions: Sequence[IntArray],
        device: torch.device,
        *,
        eos_token_id: int,
        pad_token_id: int,
    ) -> Responses:
        """Of each trajectory's response tokens (L,) and its masked positions (n,), ascending."""
        lengths = [len(canvas) for canvas in canvases]
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
        counts = [len(masked) for masked in positions]
        places = np.concatenate([start + masked for start, masked in zip(starts, positions, strict=True)])
        hidden = []
        for canvas, masked in zip(canvases, positions, strict=True):
            revealed = np.ones(len(canvas), dtype=np.bool_)
            revealed[masked] = False
            ended = revealed & (canvas == eos_token_id)
            hidden.append((np.cumsum(ended) > ended) | (revealed & (canvas == pad_token_id)))

        def there(values: IntArray) -> Tensor:
            return upload(torch.from_numpy(values), device, torch.int64)

        return cls(
            tuple(lengths),
            committed=there(np.concatenate(canvases)),
            first=there(np.repeat(starts, lengths)),
            masked=there(places),
            owner=there(np.repeat(np.arange(len(counts)), counts)),
            places=places,
            hidden=np.concatenate(hidden),
        )


@dataclass(slots=True)
class Timings:
    """Seconds spent inside the loop, for metrics."""

    reward_forward_seconds: float = 0.0
    reward_backward_seconds: float = 0.0
    reward_calls: int = 0


@dataclass(frozen=True, slots=True)
class _Pass:
    """Tokens of one pass: their packing, positions (S',) and embeddings (S', D), and where some of the logits' `rows`
    (n,) are `at` (n,) among them."""

    packing: Packing
    positions: Tensor
    embeds: Tensor
    rows: Tensor
    at: Tensor


class Assembly(ABC):
    """Where every packed reward-model token of one objective comes from; fixed for a denoising step.

    The packed order is: for each trajectory what leads, its response from the first place that is not settled on less
    what is hidden for certain, then its suffix; S tokens. `response` (S,) is a token's place among the responses, -1
    around them; `owner` (S,) its trajectory; `base` (S, D) holds what does not change; `rows` (n,) of the logits go to
    `place` (n,), the others are hidden for certain.
    """

    def __init__(self, objective: Objective, responses: Responses) -> None:
        device, table = responses.committed.device, objective.model.table
        self.objective = objective
        response, position, fixed_ids = [], [], []
        self.lengths: list[int] = []
        start = 0
        for length, context in zip(responses.lengths, objective.contexts, strict=True):
            lead, tail, settled = len(context.lead_ids), len(context.suffix_ids), context.settled
            own = start + settled + np.flatnonzero(~responses.hidden[start + settled : start + length])
            response.append(np.concatenate([np.full(lead, -1), own, np.full(tail, -1)]))
            first = context.start
            position += [np.arange(first - lead, first), first + own - start, first + length + np.arange(tail)]
            fixed_ids += [*context.lead_ids, *context.suffix_ids]
            self.lengths.append(lead + len(own) + tail)
            start += length
        places = np.concatenate(response)
        place_of = np.full(start, -1)
        place_of[places[places >= 0]] = np.flatnonzero(places >= 0)

        def there(values: IntArray) -> Tensor:
            return upload(torch.from_numpy(values), device, torch.int64)

        self.response = there(places)
        self.position = there(np.concatenate(position))
        self.owner = there(np.repeat(np.arange(len(self.lengths)), self.lengths))
        place = place_of[responses.places]
        self.rows, self.place = there(np.flatnonzero(place >= 0)), there(place[place >= 0])
        self.base = table[responses.committed[self.response.clamp_min(0)]]
        if fixed_ids:
            fixed = objective.model.own_embeddings(torch.tensor(fixed_ids, dtype=torch.long)).to(table.device)
            self.base.index_copy_(0, there(np.flatnonzero(places < 0)), fixed)

    @abstractmethod
    def _take(self, embeds: Tensor, seen: Tensor) -> _Pass:
        """The tokens of a pass in which some of the S tokens are `seen` (S,), masked ones being `embeds` (N, D)."""

    def read(self, embeds: Tensor, visible: Tensor, timings: Timings, *, gradient: bool) -> tuple[Tensor, Tensor]:
        """Unweighted rewards (B,) and dr/de (N, D) with masked positions entering as `embeds` (N, D).

        `visible` (R,) bool hides response positions. The gradient is zeros when not asked for.
        """
        taken = self._take(embeds.to(self.base.dtype), (self.response < 0) | visible[self.response.clamp_min(0)])
        x = taken.embeds
        g = torch.zeros_like(embeds)
        started = time.perf_counter()
        model, g_x = self.objective.model, None
        if gradient and model.graphed_passes is not None and model.graphed_passes.takes(taken.packing):
            rewards, g_x = model.graphed_passes.run(taken.packing, taken.positions, x)
            forwarded = time.perf_counter()
        else:
            with torch.enable_grad() if gradient else torch.no_grad():
                rewards = model.read(taken.packing, taken.positions, x.requires_grad_(gradient))
                total = rewards.sum()
            forwarded = time.perf_counter()
            if gradient:
                (g_x,) = torch.autograd.grad(total, [x])
        if g_x is not None:
            g.index_copy_(0, taken.rows, g_x.index_select(0, taken.at).to(g.dtype))
        timings.reward_forward_seconds += forwarded - started
        timings.reward_backward_seconds += time.perf_counter() - forwarded
        timings.reward_calls += 1
        return rewards.detach(), g


class HiddenLeftOut(Assembly):
    """Passes over the tokens that are seen alone; waits for the device to know which."""

    def __init__(self, objective: Objective, responses: Responses) -> None:
        super().__init__(objective, responses)
        self.row = torch.full_like(self.response, -1).index_copy_(0, self.place, self.rows)

    def _take(self, embeds: Tensor, seen: Tensor) -> _Pass:
        contexts = self.objective.contexts
        selected = torch.nonzero(seen)[:, 0]
        row = self.row[selected]
        at = torch.nonzero(row >= 0)[:, 0]
        rows = row[at]
        lengths = torch.bincount(self.owner[selected], minlength=len(contexts)).tolist()
        packing = self.objective.model.packing([context.prefix for context in contexts], lengths)
        return _Pass(packing, self.position[selected], self.base[selected].index_copy_(0, at, embeds[rows]), rows, at)


class HiddenBehind(Assembly):
    """Passes over all tokens, hidden ones behind the row's others; all of it on the device.

    A row of which nothing is seen (everything hidden, and nothing around the response) has the reward NaN.
    """

    def __init__(self, objective: Objective, responses: Responses) -> None:
        super().__init__(objective, responses)
        device = self.owner.device
        sizes = np.array(self.lengths)
        self.start = upload(torch.from_numpy(np.cumsum(sizes) - sizes), device)  # (B,), of each row
        self.stop = upload(torch.from_numpy(np.cumsum(sizes)), device)
        self.first = self.start[self.owner]  # (S,)
        self.index = torch.arange(len(self.owner), device=device)
        self.packing = objective.model.packing([context.prefix for context in objective.contexts], self.lengths)

    def _take(self, embeds: Tensor, seen: Tensor) -> _Pass:
        count = torch.cat([seen.new_zeros(1, dtype=torch.int64), seen.cumsum(0)])  # (S + 1,), of those in front
        visible = count[self.stop] - count[self.start]
        before = count[:-1] - count[self.first]  # seen ones of the same row in front
        behind = visible[self.owner] + (self.index - self.first - before)
        at = self.first + torch.where(seen, before, behind)
        whole = self.base.index_copy(0, self.place, embeds.index_select(0, self.rows))
        x = torch.empty_like(whole).index_copy_(0, at, whole)
        nothing = torch.where(visible > 0, 0.0, torch.nan).to(x.dtype)
        return _Pass(
            self.packing.hiding(visible.clamp_min(1)),
            torch.empty_like(self.position).index_copy_(0, at, self.position),
            x.index_add_(0, self.start, nothing[:, None].expand(-1, x.shape[1])),
            self.rows,
            at[self.place],
        )


def assemble(objective: Objective, responses: Responses) -> Assembly:
    """In the way that suits the attention of the objective's model."""
    return (HiddenBehind if objective.model.reads_lengths_on_device else HiddenLeftOut)(objective, responses)

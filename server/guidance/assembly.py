"""What a reward model reads in a pass of the gradient loop: packed tokens of many trajectories, most of them fixed.

The reward model runs on packed ragged rows: nothing is padded, response positions after an EOS (hidden ones) are not
seen (position ids keep counting across them), and the part before the response comes from a prefix cache.

Which positions are hidden follows from the logits, so in each pass only the device knows it at first. On a CPU asking
costs nothing, and the pass runs the tokens that are seen, not one more. A GPU is never asked, so that it always has its
next work queued: each row keeps its length there, hidden tokens are moved after the row's seen ones, where causality
hides them, and the row is read at its last seen token. Hidden tokens are then computed for nothing, and their gradients
are exactly zero. That takes an attention that reads lengths from the device.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.transfer import upload
from server.diffusion.sampler import BoolArray, IntArray
from server.guidance.prefixes import RewardContext
from server.models.packing import PackedLayout
from server.rewards.reward_model import RewardModel


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
    On the host: `places`, which are the same as `masked`, `ends`, where each answer ends among its own positions, and
    `hidden` (R,), positions that are hidden from reward models whatever becomes of the masked ones: by revealed tokens,
    or because they are past that end. `eos_token_id` and `pad_token_id` are the diffusion model's.
    """

    lengths: tuple[int, ...]
    ends: tuple[int, ...]
    committed: Tensor
    first: Tensor
    masked: Tensor
    owner: Tensor
    places: IntArray
    hidden: BoolArray
    eos_token_id: int
    pad_token_id: int

    @classmethod
    def of(
        cls,
        canvases: Sequence[IntArray],
        positions: Sequence[IntArray],
        device: torch.device,
        *,
        ends: Sequence[int] | None = None,
        eos_token_id: int,
        pad_token_id: int,
    ) -> Responses:
        """Of each trajectory's response tokens (L,) and its masked positions (n,), ascending. `ends` bound the answers,
        which else are all of their responses."""
        lengths = [len(canvas) for canvas in canvases]
        bounds = tuple(map(min, lengths, ends or lengths))
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
        counts = [len(masked) for masked in positions]
        places = np.concatenate([start + masked for start, masked in zip(starts, positions, strict=True)])
        hidden = []
        for canvas, masked, end in zip(canvases, positions, bounds, strict=True):
            revealed = np.ones(len(canvas), dtype=np.bool_)
            revealed[masked] = False
            ended = revealed & (canvas == eos_token_id)
            past = np.arange(len(canvas)) >= end
            hidden.append(past | (np.cumsum(ended) > ended) | (revealed & (canvas == pad_token_id)))

        def there(values: IntArray) -> Tensor:
            return upload(torch.from_numpy(values), device, torch.int64)

        return cls(
            tuple(lengths),
            bounds,
            committed=there(np.concatenate(canvases)),
            first=there(np.repeat(starts, lengths)),
            masked=there(places),
            owner=there(np.repeat(np.arange(len(counts)), counts)),
            places=places,
            hidden=np.concatenate(hidden),
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
        )

    def visible(self, tokens: Tensor) -> Tensor:
        """Which positions (R,) a reward model sees when they hold `tokens` (R,): none after a trajectory's first EOS,
        none that holds the pad token."""
        ended = (tokens == self.eos_token_id).long()
        before = ended.cumsum(0) - ended
        return (before == before[self.first]) & (tokens != self.pad_token_id)


@dataclass(slots=True)
class Timings:
    """Seconds spent inside the loop, for metrics."""

    reward_forward_seconds: float = 0.0
    reward_backward_seconds: float = 0.0


class Assembly:
    """Where every packed reward-model token of one objective comes from; fixed for a denoising step.

    The packed order is: for each trajectory what leads, its response from the first place that is not settled on less
    what is hidden for certain, then its suffix; S tokens. `response` (S,) is a token's place among the responses, -1
    around them; `owner` (S,) its trajectory; `base` (S, D) holds what does not change; `rows` (n,) of the logits go to
    `place` (n,), the others are hidden for certain. `content` (S,) is false at the reward model's padding around the
    responses; None where no row ends with any, and then where it stands makes no difference.
    """

    def __init__(self, objective: Objective, responses: Responses) -> None:
        model, device = objective.model, responses.committed.device
        self.objective = objective
        response, position, fixed_ids = [], [], []
        lengths: list[int] = []
        start = 0
        for length, end, context in zip(responses.lengths, responses.ends, objective.contexts, strict=True):
            lead, tail, settled = len(context.lead_ids), len(context.suffix_ids), context.settled
            own = start + settled + np.flatnonzero(~responses.hidden[start + settled : start + length])
            response.append(np.concatenate([np.full(lead, -1), own, np.full(tail, -1)]))
            first = context.start
            position += [np.arange(first - lead, first), first + own - start, first + end + np.arange(tail)]
            fixed_ids += [*context.lead_ids, *context.suffix_ids]
            lengths.append(lead + len(own) + tail)
            start += length
        self.lengths = tuple(lengths)
        places = np.concatenate(response)
        place_of = np.full(start, -1)
        place_of[places[places >= 0]] = np.flatnonzero(places >= 0)

        def there(values: npt.NDArray[np.generic]) -> Tensor:
            return upload(torch.from_numpy(values), device)

        self.response = there(places)
        self.position = there(np.concatenate(position))
        self.owner = there(np.repeat(np.arange(len(lengths)), lengths))
        place = place_of[responses.places]
        self.rows, self.place = there(np.flatnonzero(place >= 0)), there(place[place >= 0])
        self.base = model.table[responses.committed[self.response.clamp_min(0)]]
        if fixed_ids:
            fixed = model.own_embeddings(torch.tensor(fixed_ids, dtype=torch.long)).to(device)
            self.base.index_copy_(0, there(np.flatnonzero(places < 0)), fixed)
        self.content: Tensor | None = None
        if any(model.content(context.suffix_ids) < max(1, len(context.suffix_ids)) for context in objective.contexts):
            content = np.ones(len(places), dtype=np.bool_)
            content[places < 0] = np.array(fixed_ids) != model.pad_token_id
            self.content = there(content)
        self.layout: PackedLayout | None = None
        if model.reads_lengths_on_device:
            self.layout = model.layout([context.prefix for context in objective.contexts], lengths, self.position)

    def read(
        self, embeds: Tensor, tokens: Tensor, visible: Tensor, timings: Timings, *, gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """Unweighted rewards (B,) and dr/de (N, D) with masked positions entering as `embeds` (N, D).

        `visible` (R,) bool hides response positions; `tokens` (R,) int64 are the diffusion-model ids that they count
        as. The gradient is zeros when not asked for. A row of which nothing is seen has the reward NaN; ValueError
        where that is known on the host.
        """
        model, place = self.objective.model, self.response.clamp_min(0)
        seen = (self.response < 0) | visible[place]
        if self.content is not None:
            seen = self._to_last_content(seen, model.padding[tokens[place]])
        layout, taken, count = self._order(seen)
        whole = self.base.index_copy(0, self.place, embeds.index_select(0, self.rows).to(self.base.dtype))
        x = whole.index_select(0, taken)
        g, g_x = torch.zeros_like(embeds), None
        started = time.perf_counter()
        if gradient and model.graphed_passes is not None and model.graphed_passes.takes(layout):
            rewards, g_x = model.graphed_passes.run(layout, x)
            forwarded = time.perf_counter()
        else:
            with torch.enable_grad() if gradient else torch.no_grad():
                rewards = model.read(layout, x.requires_grad_(gradient))
                total = rewards.sum()
            forwarded = time.perf_counter()
            if gradient:
                (g_x,) = torch.autograd.grad(total, [x])
        if g_x is not None:
            back = torch.zeros_like(whole).index_copy_(0, taken, g_x.to(whole.dtype))
            g.index_copy_(0, self.rows, back.index_select(0, self.place).to(g.dtype))
        timings.reward_forward_seconds += forwarded - started
        timings.reward_backward_seconds += time.perf_counter() - forwarded
        return torch.where(count > 0, rewards.detach(), torch.nan), g

    def _order(self, seen: Tensor) -> tuple[PackedLayout, Tensor, Tensor]:
        """A pass in which some of the S tokens are `seen` (S,): its layout, which tokens it takes in which order, and
        how many of each row are seen (B,)."""
        rows = len(self.lengths)
        if self.layout is None:
            taken = torch.nonzero(seen)[:, 0]
            count = torch.bincount(self.owner[taken], minlength=rows)
            prefixes = [context.prefix for context in self.objective.contexts]
            return self.objective.model.layout(prefixes, count.tolist(), self.position[taken]), taken, count
        taken = torch.argsort(2 * self.owner + (~seen).long(), stable=True)
        count = torch.zeros(rows, dtype=torch.int64, device=seen.device).index_add_(0, self.owner, seen.long())
        return self.layout.hiding(count.clamp_min(1), self.position.index_select(0, taken)), taken, count

    def _to_last_content(self, seen: Tensor, padding: Tensor) -> Tensor:
        """`seen` without what comes after a row's last seen token that is not the reward model's padding."""
        content = seen & torch.where(self.response < 0, self.content, ~padding)  # type: ignore[arg-type]
        index = torch.arange(len(seen), device=seen.device)
        last = torch.full((len(self.lengths),), -1, dtype=torch.int64, device=seen.device)
        last = last.scatter_reduce(0, self.owner, torch.where(content, index, -1), "amax")
        return seen & (index <= last[self.owner])

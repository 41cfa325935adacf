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
import torch
from torch import Tensor

from kernels.transfer import upload_all
from server.diffusion.sampler import BoolArray, IntArray
from server.guidance.prefixes import RewardContext
from server.models.packing import PackedLayout
from server.rewards.reward_model import RewardModel


@dataclass(frozen=True, slots=True)
class Objective:
    """One reward model, its context for each of B trajectories, and its weight in each one's objective, (B,) float64,
    on the host."""

    model: RewardModel
    contexts: tuple[RewardContext, ...]
    weights: Tensor


@dataclass(frozen=True, slots=True)
class Responses:
    """The responses of B trajectories, packed one after another (R = sum of their lengths), of which N positions are
    masked, one a row of the logits. All int64 but for `hidden`. Tensors are on the host until `assembled`.

    `committed` (R,) holds revealed tokens (anything where masked); `first` (R,) is the packed position at which the
    same response begins. `masked` (N,) is the packed position of each row, ascending, and `owner` (N,) its trajectory.
    For good on the host: `tokens` and `places`, which are the same as `committed` and `masked`, `ends`, where each
    answer ends among its own positions, and `hidden` (R,), positions that are hidden from reward models whatever
    becomes of the masked ones: by revealed tokens, or because they are past that end. `eos_token_id` and `pad_token_id`
    are the diffusion model's.
    """

    lengths: tuple[int, ...]
    ends: tuple[int, ...]
    committed: Tensor
    first: Tensor
    masked: Tensor
    owner: Tensor
    tokens: IntArray
    places: IntArray
    hidden: BoolArray
    eos_token_id: int
    pad_token_id: int

    @classmethod
    def of(
        cls,
        canvases: Sequence[IntArray],
        positions: Sequence[IntArray],
        *,
        ends: Sequence[int] | None = None,
        eos_token_id: int,
        pad_token_id: int,
    ) -> Responses:
        """Of each trajectory's response tokens (L,) and its masked positions (n,), ascending. `ends` bound the answers,
        which else are all of their responses."""
        lengths = [len(canvas) for canvas in canvases]
        bounds = tuple(map(min, lengths, ends or lengths))
        counts = [len(masked) for masked in positions]
        first = (np.cumsum(lengths) - lengths).repeat(lengths)
        owner = np.arange(len(counts)).repeat(counts)
        tokens = np.concatenate(canvases)
        places = np.concatenate(positions) + (np.cumsum(lengths) - lengths)[owner]
        revealed = np.ones(len(tokens), dtype=np.bool_)
        revealed[places] = False
        ended = (revealed & (tokens == eos_token_id)).cumsum()
        before = np.concatenate([[0], ended])
        hidden = (before[:-1] > before[first]) | (revealed & (tokens == pad_token_id))
        hidden |= np.arange(len(tokens)) - first >= np.array(bounds).repeat(lengths)
        committed, masked = torch.from_numpy(tokens.astype(np.int64, copy=False)), torch.from_numpy(places)
        return cls(
            tuple(lengths),
            bounds,
            committed,
            torch.from_numpy(first),
            masked,
            torch.from_numpy(owner),
            tokens,
            places,
            hidden,
            eos_token_id,
            pad_token_id,
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


@dataclass(frozen=True, slots=True)
class Places:
    """Where every packed reward-model token of one objective comes from; fixed for some inner steps.

    The packed order is: for each trajectory what leads, its response from the first place that is not settled on less
    what is hidden for certain, then its suffix; S tokens. `response` (S,) is a token's place among the responses, -1
    around them; `position` (S,) its position; `owner` (S,) its trajectory; `known` (S + 1,) its id where it is
    revealed, of the diffusion vocabulary. The ids `fixed` of the reward vocabulary are at `around`. The rows of the
    logits go to `place` (N,), those that are hidden for certain to -1, a last token that nobody reads. `content` (S,)
    is false at the reward model's padding around the responses; None where no row ends with any, and then where it
    stands makes no difference. `weights` (B,) are the objective's. Tensors are on the host until `assembled`.
    """

    lengths: tuple[int, ...]
    response: Tensor
    position: Tensor
    owner: Tensor
    known: Tensor
    fixed: Tensor
    around: Tensor
    place: Tensor
    content: Tensor | None
    weights: Tensor

    @classmethod
    def of(cls, objective: Objective, responses: Responses) -> Places:
        """Of these responses, within the contexts of an objective."""
        model = objective.model
        response, position, fixed = [], [], []
        lengths: list[int] = []
        start = 0
        for length, end, context in zip(responses.lengths, responses.ends, objective.contexts, strict=True):
            lead, tail, settled = len(context.lead_ids), len(context.suffix_ids), context.settled
            own = start + settled + np.flatnonzero(~responses.hidden[start + settled : start + length])
            response += [np.full(lead, -1), own, np.full(tail, -1)]
            first = context.start
            position += [np.arange(first - lead, first), first + own - start, first + end + np.arange(tail)]
            fixed += [*context.lead_ids, *context.suffix_ids]
            lengths.append(lead + len(own) + tail)
            start += length
        places, ids = np.concatenate(response), np.array(fixed, dtype=np.int64)
        outside = places < 0
        place_of = np.full(start, -1)
        place_of[places[~outside]] = np.flatnonzero(~outside)
        content = None
        if any(model.content(context.suffix_ids) < max(1, len(context.suffix_ids)) for context in objective.contexts):
            content = np.ones(len(places), dtype=np.bool_)
            content[outside] = ids != model.pad_token_id
        return cls(
            tuple(lengths),
            response=torch.from_numpy(places),
            position=torch.from_numpy(np.concatenate(position)),
            owner=torch.from_numpy(np.arange(len(lengths)).repeat(lengths)),
            known=torch.from_numpy(responses.tokens[np.append(places.clip(0), 0)]),
            fixed=torch.from_numpy(ids),
            around=torch.from_numpy(np.flatnonzero(outside)),
            place=torch.from_numpy(place_of[responses.places]),
            content=None if content is None else torch.from_numpy(content),
            weights=objective.weights,
        )


class Assembly:
    """What one objective reads in the inner steps: where its tokens come from, all on the device, and of them `base`
    (S + 1, D), what does not change. `layout` is there where it does not depend on what is hidden."""

    def __init__(self, objective: Objective, places: Places, layout: PackedLayout | None) -> None:
        model = objective.model
        self.objective, self.places, self.layout = objective, places, layout
        self.outside, self.inside = places.response < 0, places.response.clamp_min(0)
        # What orders tokens where some are hidden: a row's seen ones first.
        self.first, self.second = 2 * places.owner, 2 * places.owner + 1
        self.base = model.table[places.known]
        if len(places.fixed):
            self.base.index_copy_(0, places.around, model.own_embeddings(places.fixed).to(self.base.device))
        self._found: tuple[Tensor, PackedLayout, Tensor, Tensor] | None = None

    @classmethod
    def of(
        cls, objectives: Sequence[Objective], responses: Responses, device: torch.device
    ) -> tuple[Responses, list[Assembly]]:
        """Of all objectives, and the responses, on the device; in one upload."""
        things: list[Places | PackedLayout | None] = []
        for objective in objectives:
            model, places, layout = objective.model, Places.of(objective, responses), None
            if model.reads_lengths_on_device:
                prefixes = [context.prefix for context in objective.contexts]
                layout = PackedLayout.of(places.lengths, prefixes=prefixes, positions=places.position, causal=True)
                if model.device != device:
                    (layout,) = upload_all([layout], model.device)
            things += [places, layout]
        responses, *sent = upload_all([responses, *things], device)
        return responses, [cls(*each) for each in zip(objectives, sent[::2], sent[1::2], strict=True)]

    def read(
        self, whole: Tensor, tokens: Tensor, visible: Tensor, timings: Timings, *, gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """Unweighted rewards (B,) and dr/de (N, D) of `whole` (S + 1, D): `base` with the masked positions' embeddings.

        `visible` (R,) bool hides response positions; `tokens` (R,) int64 are the diffusion-model ids that they count
        as. The gradient is zeros when not asked for. A row of which nothing is seen has the reward NaN; ValueError
        where that is known on the host.
        """
        model, places = self.objective.model, self.places
        seen = self.outside | visible[self.inside]
        if places.content is not None:
            seen = self._to_last_content(seen, places.content, model.padding[tokens[self.inside]])
        layout, taken, count = self._order(seen)
        x = whole.index_select(0, taken)
        g_whole = torch.zeros_like(whole)
        started = time.perf_counter()
        if not gradient:
            rewards = model.read(layout, x)
            forwarded = time.perf_counter()
        else:
            passes = model.graphed_passes
            way = passes if passes is not None and passes.takes(layout) else model
            rewards, back = way.read_with_gradient(layout, x)
            forwarded = time.perf_counter()
            g_whole.index_copy_(0, taken, back().to(whole.dtype))
        timings.reward_forward_seconds += forwarded - started
        timings.reward_backward_seconds += time.perf_counter() - forwarded
        return torch.where(count > 0, rewards, torch.nan), g_whole[places.place]

    def _order(self, seen: Tensor) -> tuple[PackedLayout, Tensor, Tensor]:
        """A pass in which some of the S tokens are `seen` (S,): its layout, which tokens it takes in which order, and
        how many of each row are seen (B,)."""
        model, places, rows = self.objective.model, self.places, len(self.places.lengths)
        if self.layout is not None:
            taken = torch.argsort(torch.where(seen, self.first, self.second), stable=True)
            count = torch.zeros(rows, dtype=torch.int64, device=seen.device).index_add_(0, places.owner, seen.long())
            position = places.position.index_select(0, taken)
            return self.layout.hiding(count.clamp_min(1).to(model.device), position.to(model.device)), taken, count
        if self._found is None or not self._found[0].equal(seen):  # most passes see what the one before saw
            taken = torch.nonzero(seen)[:, 0]
            count = torch.bincount(places.owner[taken], minlength=rows)
            prefixes = [context.prefix for context in self.objective.contexts]
            self._found = seen, model.layout(prefixes, count.tolist(), places.position[taken]), taken, count
        return self._found[1:]

    def _to_last_content(self, seen: Tensor, around: Tensor, padding: Tensor) -> Tensor:
        """`seen` without what comes after a row's last seen token that is not the reward model's padding."""
        content = seen & torch.where(self.outside, around, ~padding)
        index = torch.arange(len(seen), device=seen.device)
        last = torch.full((len(self.places.lengths),), -1, dtype=torch.int64, device=seen.device)
        last = last.scatter_reduce(0, self.places.owner, torch.where(content, index, -1), "amax")
        return seen & (index <= last[self.places.owner])

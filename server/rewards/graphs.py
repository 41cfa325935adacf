"""A reward model's passes, forward and back to its inputs, as CUDA graphs (`models.graphs`).

Rewards are independent of each other, so the gradient of their sum holds each row's own: forward and backward are one
graph, with no autograd around it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from kernels.recording import Record, recorder
from kernels.trial import difference
from server.models.acceleration import graphless, tried
from server.models.graphs import MOST_CACHED, Graphs, Outputs
from server.models.packing import EMPTY_PREFIX, PackedLayout
from server.models.padding import Arena
from server.rewards.reward_model import RewardModel

TRIAL_PREFIX, TRIAL_LENGTHS = 12, ((5, 8), (4, 6), (7, 7))
"""Tokens of the trial runs: of the cached prefix, and of the two rows in each."""


class GraphedPasses:
    """Records and replays passes of one reward model; nothing waits for the device."""

    def __init__(self, model: RewardModel, record: Record[Outputs]) -> None:
        self._model = model
        arena = Arena(model.shape, MOST_CACHED, model.activation_dtype, model.device)
        self.recorded = Graphs(lambda embeds, layout: differentiate(model, layout, embeds), record, arena)

    def takes(self, layout: PackedLayout) -> bool:
        """Whether `run` does: rows with hidden tokens, of no more tokens than a graph is worth."""
        return layout.visible is not None and self.recorded.takes(layout)

    def read_with_gradient(self, layout: PackedLayout, embeds: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
        """`RewardModel.read_with_gradient` of rows that it `takes`: one launch, which has the gradient too."""
        rewards, g = self.run(layout, embeds)
        return rewards, lambda: g

    def run(self, layout: PackedLayout, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards (B,) and their sum's gradient (S, D) of rows that it `takes`; on the device and in the dtype of
        `embeds`, and the caller's."""
        device = self._model.device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            rewards, g = self.recorded.run(embeds, layout)
            rewards, g = rewards[: len(layout.lengths)], g[: layout.tokens]
            return rewards.to(embeds.device, copy=True), g.to(embeds.device, embeds.dtype, copy=True)


def differentiate(model: RewardModel, layout: PackedLayout, embeds: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards (B,) and their sum's gradient (S, D) with respect to the embeddings, kernel by kernel."""
    rewards, gradient = model.read_with_gradient(layout, embeds)
    return rewards, gradient()


def graph_passes(model: RewardModel, record: Record[Outputs] | None = None) -> str:
    """Let a model's passes run as graphs from now on, after some have agreed with what they are graphs of. Returns why
    they do not, "" where they do. `record` is the device's `recorder` unless a test names another."""
    if not model.written_out:
        return "transformers runs its architecture"
    if record is None and (unfit := graphless(model.device, model.attention_backend)):
        return unfit
    passes = GraphedPasses(model, record or recorder(model.device))
    if not (unfit := tried(lambda: worst_difference(model, passes))):
        model.graphed_passes = passes
    return unfit


@torch.no_grad()
def worst_difference(model: RewardModel, passes: GraphedPasses) -> float:
    """Of small passes of one bucket, with and without a cached prefix: the largest difference of rewards or gradients
    from those computed kernel by kernel, relative to their norm."""
    found, expected = list[Tensor](), list[Tensor]()
    prefix = model.prefill(range(TRIAL_PREFIX))
    trials = ((prefix, EMPTY_PREFIX), (EMPTY_PREFIX, prefix), (prefix, prefix))
    for seed, (prefixes, lengths) in enumerate(zip(trials, TRIAL_LENGTHS, strict=True)):
        ids = torch.randint(len(model.table), (sum(lengths),), generator=torch.Generator().manual_seed(seed))
        embeds = model.table[ids.to(model.table.device)]
        layout = model.layout(prefixes, lengths)
        layout = layout.hiding((torch.tensor(lengths) - 2).to(model.device), layout.positions)
        found += passes.run(layout, embeds)
        expected += differentiate(model, layout, embeds)
    return difference(found, expected)

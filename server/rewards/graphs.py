"""A reward model's passes, forward and back to its inputs, as CUDA graphs (`models.graphs`).

Rewards are independent of each other, so the gradient of their sum holds each row's own: forward and backward are one
graph, with no autograd around it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from server.errors import ConfigurationError
from server.models import graphs
from server.models.acceleration import reason
from server.models.graphs import Graphs, Record, recorder
from server.models.packing import EMPTY_PREFIX, PackedLayout
from server.models.padding import Arena
from server.rewards.reward_model import RewardModel

logger = logging.getLogger(__name__)

TOLERANCE = 0.05
"""How far a trial run's rewards and gradients may be off in 16 bits, relative to their norm."""

TRIAL_PREFIX, TRIAL_LENGTHS = 12, ((5, 8), (4, 6), (7, 7))
"""Tokens of the trial runs: of the cached prefix, and of the two rows in each."""


class GraphedPasses:
    """Records and replays passes of one reward model; nothing waits for the device."""

    def __init__(self, model: RewardModel, record: Record) -> None:
        self._model = model
        arena = Arena(model.shape, graphs.MOST_TOKENS, model.activation_dtype, model.device)
        self.recorded = Graphs(lambda embeds, layout, _: differentiate(model, layout, embeds), record, arena)

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
        nothing = torch.empty(0, dtype=torch.int64, device=device)
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            rewards, g = self.recorded.run(embeds.to(device, self._model.activation_dtype), layout, nothing)
        rewards, g = rewards[: len(layout.lengths)], g[: layout.tokens]
        return rewards.to(embeds.device), g.to(embeds.device, embeds.dtype)


def differentiate(model: RewardModel, layout: PackedLayout, embeds: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards (B,) and their sum's gradient (S, D) with respect to the embeddings, kernel by kernel."""
    rewards, gradient = model.read_with_gradient(layout, embeds)
    return rewards, gradient()


def graph_where_possible(model: RewardModel) -> None:
    """`graph_passes` for a model that can have graphs; for another a warning that names it."""
    if model.device.type == "cuda" and model.written_out:
        graph_passes(model)
        return
    why = f"it is on {model.device}" if model.written_out else "transformers runs its architecture"
    logger.warning("cuda_graphs: reward model %s runs without graphs: %s", model.name, why)


def graph_passes(model: RewardModel) -> GraphedPasses:
    """Let a model's passes, of our own layers, run as graphs from now on, after some have agreed with what they are
    graphs of. Raises ConfigurationError where they cannot."""
    if model.device.type != "cuda":
        raise ConfigurationError(f"cuda_graphs: there are none on {model.device}")
    if not model.reads_lengths_on_device:
        raise ConfigurationError(
            f"cuda_graphs: it needs the attention backend varlen; {model.name} has {model.attention_backend}"
        )
    with torch.cuda.device(model.device):
        passes = GraphedPasses(model, recorder())
        try:
            off = worst_difference(model, passes)
        except Exception as error:
            raise ConfigurationError(f"cuda_graphs: {model.name} cannot be run so here: {reason(error)}") from error
    if not off <= TOLERANCE:
        raise ConfigurationError(f"cuda_graphs: a trial run of {model.name} was off by {off:.3g}")
    model.graphed_passes = passes
    return passes


@torch.no_grad()
def worst_difference(model: RewardModel, passes: GraphedPasses) -> float:
    """Of small passes of one bucket, with and without a cached prefix: the largest difference of rewards or gradients
    from those computed kernel by kernel, relative to their norm."""
    worst = 0.0
    prefix = model.prefill(range(TRIAL_PREFIX))
    trials = ((prefix, EMPTY_PREFIX), (EMPTY_PREFIX, prefix), (prefix, prefix))
    for seed, (prefixes, lengths) in enumerate(zip(trials, TRIAL_LENGTHS, strict=True)):
        ids = torch.randint(len(model.table), (sum(lengths),), generator=torch.Generator().manual_seed(seed))
        embeds = model.table[ids.to(model.table.device)]
        layout = model.layout(prefixes, lengths)
        layout = layout.hiding((torch.tensor(lengths) - 2).to(model.device), layout.positions)
        for got, expected in zip(passes.run(layout, embeds), differentiate(model, layout, embeds), strict=True):
            worst = max(worst, float((got.double() - expected.double()).norm() / expected.double().norm()))
    return worst

"""CUDA graphs of a reward model's pass, forward and back to its inputs: some thousand kernels become one launch.

A graph replays the same kernels on the same memory. So each bucket of `rewards.padding` has a graph and inputs of its
own; all share one memory pool, and one place for cached keys and values. Rewards are independent of each other, so the
gradient of their sum holds each row's own: forward and backward are one graph, with no autograd around it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor

from kernels.recording import Recording
from server.errors import ConfigurationError
from server.rewards.attention import EMPTY_PREFIX, Packing
from server.rewards.padding import Arena, Inputs, Shape, pad, shape_of
from server.rewards.reward_model import RewardModel
from server.rewards.varlen import VarlenRows

MOST_TOKENS = 4096
"""Own tokens of a pass, and cached ones. A larger pass keeps the GPU busy for longer than its launches take."""

MOST_GRAPHS = 48
"""The least recently used one goes first."""

TOLERANCE = 0.05
"""Of a trial run's rewards and gradients, in 16 bits, relative to their norm."""

TRIAL_LENGTHS = 12, 9
"""Of the trial run's prefix, and a bound on its rows."""

Pass = tuple[Tensor, Tensor]
"""Rewards (B,), and their sum's gradient (S, D) with respect to the embeddings."""


class Replayed(Protocol):
    """A pass over inputs that stay where they are."""

    def replay(self) -> Pass:
        """Of what they hold now."""


Record = Callable[[Callable[[], Pass]], Replayed]
"""What makes a graph of a pass: `kernels.recording.Recording`; without a GPU, in tests, what runs it again will do."""


class GraphedPasses:
    """Records and replays passes of one reward model; nothing waits for the device."""

    def __init__(
        self, model: RewardModel, record: Record, *, most_tokens: int = MOST_TOKENS, most_graphs: int = MOST_GRAPHS
    ) -> None:
        self._model, self._record = model, record
        self._most_tokens, self._most_graphs = most_tokens, most_graphs
        self._arena = Arena(model.shape, most_tokens, model.activation_dtype, model.device)
        self._graphs: OrderedDict[Shape, tuple[Inputs, Replayed]] = OrderedDict()
        self._turn = threading.Lock()
        self._last_use = torch.cuda.Event() if model.device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @property
    def graphs(self) -> int:
        """How many are held."""
        return len(self._graphs)

    def takes(self, packing: Packing) -> bool:
        """Whether `run` does: rows with hidden tokens, of no more tokens than a graph is worth."""
        if not isinstance(packing.varlen, VarlenRows) or packing.hidden is None:
            return False
        shape = shape_of(packing.varlen)
        return max(shape.tokens, shape.cached) <= self._most_tokens

    def run(self, packing: Packing, positions: Tensor, embeds: Tensor) -> Pass:
        """Rewards (B,) and gradient (S, D) of rows that it `takes`, at positions (S,) with embeddings (S, D); on the
        device and in the dtype of `embeds`, and the caller's. Threads with streams of their own take turns."""
        device, rows = self._model.device, packing.varlen
        if not isinstance(rows, VarlenRows):
            raise ValueError("graphs need a variable-length attention")
        shape = shape_of(rows)
        inputs = pad(packing, positions.to(device), embeds.to(device, self._model.activation_dtype), shape)
        with self._turn, torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            if self._last_use is not None:
                torch.cuda.current_stream().wait_event(self._last_use)
            self._arena.hold(rows.links)
            memory, graph = self._of(shape, inputs)
            memory.copy_(inputs)
            rewards, g = (x.clone() for x in graph.replay())  # the next graph may write over them
            if self._last_use is not None:
                self._last_use.record()
        rewards, g = rewards[: len(packing.lasts)], g[: rows.tokens]
        return rewards.to(embeds.device), g.to(embeds.device, embeds.dtype)

    def _of(self, shape: Shape, inputs: Inputs) -> tuple[Inputs, Replayed]:
        """The memory and the graph of a bucket; new ones keep the memory of `inputs`."""
        if shape not in self._graphs:
            # Its memory may be in use by another stream, so it goes when recording has waited for the device.
            oldest = self._graphs.popitem(last=False) if len(self._graphs) >= self._most_graphs else None
            cached = self._arena.prefix(shape.cached)

            def once() -> Pass:
                packing = inputs.packing(shape, cached, self._model.attention_backend)
                return differentiate(self._model, packing, inputs.positions, inputs.embeds)

            self._graphs[shape] = inputs, self._record(once)
            del oldest
        self._graphs.move_to_end(shape)
        return self._graphs[shape]


def differentiate(model: RewardModel, packing: Packing, positions: Tensor, embeds: Tensor) -> Pass:
    """Rewards and gradient of a pass, kernel by kernel."""
    with torch.enable_grad():
        x = embeds.detach().requires_grad_()
        rewards = model.read(packing, positions, x)
        (g,) = torch.autograd.grad(rewards.sum(), [x])
    return rewards.detach(), g


def graph_passes(model: RewardModel) -> GraphedPasses:
    """Let a model's passes run as graphs from now on, after some have agreed with what they are graphs of. Raises
    ConfigurationError where they cannot."""
    if model.device.type != "cuda":
        raise ConfigurationError(f"reward_cuda_graphs: there are none on {model.device}")
    if not model.reads_lengths_on_device:
        raise ConfigurationError(
            f"reward_cuda_graphs: it needs the attention backend varlen; {model.name} has {model.attention_backend}"
        )
    if not model.written_out:
        raise ConfigurationError(f"reward_cuda_graphs: {model.name} is of an architecture that transformers runs")
    with torch.cuda.device(model.device):
        pool = torch.cuda.graph_pool_handle()
        passes = GraphedPasses(model, lambda once: Recording(once, pool))
        try:
            off = worst_difference(model, passes)
        except Exception as error:
            reason = "; ".join(str(error).strip().splitlines()[:2]) or type(error).__name__
            raise ConfigurationError(f"reward_cuda_graphs: {model.name} cannot be run so here: {reason}") from error
    if not off <= TOLERANCE:
        raise ConfigurationError(f"reward_cuda_graphs: a trial run of {model.name} was off by {off:.3g}")
    model.graphed_passes = passes
    return passes


@torch.no_grad()
def worst_difference(model: RewardModel, passes: GraphedPasses) -> float:
    """Of small passes of one bucket, with and without a cached prefix, from the same kernel by kernel: the largest
    difference of rewards or gradients, relative to their norm."""
    worst = 0.0
    prefix = model.prefill(list(range(TRIAL_LENGTHS[0])))
    for seed, prefixes in enumerate(([prefix, EMPTY_PREFIX], [EMPTY_PREFIX, prefix], [prefix, prefix])):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(4, TRIAL_LENGTHS[1], (2,), generator=generator).tolist()
        ids = torch.randint(len(model.table), (sum(lengths),), generator=generator)
        embeds = model.table[ids.to(model.table.device)]
        positions = torch.cat([torch.arange(n) + p.length for n, p in zip(lengths, prefixes, strict=True)])
        positions = positions.to(embeds.device)
        visible = (torch.tensor(lengths) - 2).to(model.device)
        packing = model.packing(prefixes, lengths).hiding(visible)
        for got, expected in zip(
            passes.run(packing, positions, embeds), differentiate(model, packing, positions, embeds), strict=True
        ):
            worst = max(worst, float((got.double() - expected.double()).norm() / expected.double().norm()))
    return worst

"""Which models fit which GPU, by the memory model of `server/worker/memory.py`: python -m benchmarks.gpu.sizes

Prints the table of docs/operations.md. For each pair in bfloat16: the weights with the reward model's table, and on
each GPU how many fully masked trajectories of 128 tokens, after a conversation of 90, are steered at once. More than
that take turns within a step. Needs triton, no GPU.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.full_size import QWEN3_0_6B
from benchmarks.gpu.estimate import CONVERSATION, LENGTH
from benchmarks.gpu.models import (
    CONTEXT,
    DREAM,
    REWARD_VOCABULARY,
    REWARDS,
    Texts,
    diffusion_model,
    reward_model,
    reward_network,
)
from benchmarks.gpu.pretend import DEVICE, Pretend
from benchmarks.memory import TEMPLATE_TOKENS
from server.budget import Budget
from server.models.a2d import A2DQwen3Model
from server.models.base import DiffusionModel
from server.models.dream import DreamModel
from server.models.layers import DecoderConfig
from server.models.llada import LLaDAModel
from server.worker.memory import Footprint, cached_share

GPUS = {"24 GB": 24 << 30, "48 GB": 48 << 30, "80 GB": 80 << 30, "141 GB": 141 * 10**9}
"""Bytes. Makers count in GiB, but for the largest."""
CONTEXT_BYTES = 1 << 30
"""Of the driver, and of libraries' work space."""
FRACTION = 0.8
LLADA = DecoderConfig(
    hidden=4096, intermediate=12_288, heads=32, key_heads=32, head_size=128, layers=32, vocab_size=126_464
)
QWEN = replace(A2DQwen3Model.read_config(QWEN3_0_6B), context_length=CONTEXT)
PAIRS: tuple[tuple[str, type[DiffusionModel], DecoderConfig, str], ...] = (
    ("Qwen3-0.6B-diffusion", A2DQwen3Model, QWEN, "0.6B"),
    ("Dream-7B", DreamModel, DREAM, "0.6B"),
    ("Dream-7B", DreamModel, DREAM, "1.7B"),
    ("Dream-7B", DreamModel, DREAM, "4B"),
    ("LLaDA-8B", LLaDAModel, LLADA, "1.7B"),
)


def pairs() -> Iterator[tuple[str, str, int, float, Footprint]]:
    """Of each pair: the two models, bytes of weights, reward-model tokens of a fully masked trajectory, and what the
    memory model knows."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), Pretend():
        texts = Texts.of(Path(folder), 1024)
        for name, family, config, size in PAIRS:
            loaded = diffusion_model(config, texts, DEVICE, family=family)
            reward = reward_model(REWARDS[size], loaded, DEVICE)
            network = reward_network(REWARDS[size], DEVICE, torch.bfloat16, REWARD_VOCABULARY)
            of = [*loaded.model.parameters(), *network.parameters(), reward.table]
            weights = sum(each.numel() * each.element_size() for each in of)
            own = LENGTH + TEMPLATE_TOKENS + CONVERSATION * cached_share(reward)
            yield name, size, weights, own, Footprint.of(loaded.model, [reward])


def budgets(footprint: Footprint, weights: int, gpu: str) -> tuple[Budget, Budget]:
    """What may share a step on that GPU, and what one trajectory may take."""
    free = max(0, GPUS[gpu] - CONTEXT_BYTES - weights)
    held = footprint.graph_tokens(free, FRACTION)
    return footprint.budgets(free, FRACTION, "cuda", context_length=CONTEXT, graph_tokens=held)


def lines() -> Iterator[str]:
    """The table, in Markdown."""
    yield f"| diffusion model | reward model | weights | {' | '.join(GPUS)} |"
    yield "|---|---|---" + "|---" * len(GPUS) + "|"
    for name, size, weights, own, footprint in pairs():
        cells = []
        for gpu in GPUS:
            _, largest = budgets(footprint, weights, gpu)
            count = int(min(largest.guided_rows / LENGTH, largest.reward_tokens / own))
            cells.append(str(count) if count else "does not fit")
        yield f"| {name} | Skywork-Qwen3-{size} | {weights / 1e9:.1f} GB | {' | '.join(cells)} |"


if __name__ == "__main__":
    print("\n".join(lines()))

"""What CUDA graphs of a reward model's passes are worth: the same passes, forward and back, kernel by kernel and as
graphs, on random weights."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoints import Shape, write_reward
from server.rewards.classifier import find_classifier
from server.rewards.graphs import GraphedPasses, differentiate
from server.rewards.reward_model import RewardModel, load_reward_model
from server.text.tokenizer import Tokenizer

REWARD = Shape(32_768, 768, 8, 12, 2304)


@dataclass(frozen=True, slots=True)
class Setup:
    """A random-weight model, and passes over `rows` rows of `tokens` tokens that continue one cached conversation."""

    reward: Shape = REWARD
    dtype: str = "bfloat16"
    rows: tuple[int, ...] = (4, 16, 32)
    tokens: int = 70
    cached: int = 80
    repeats: int = 20


def measure_passes(
    device: torch.device, setup: Setup, graph: Callable[[RewardModel], GraphedPasses], attention: str
) -> list[dict[str, Any]]:
    """The best milliseconds of a pass, for each number of rows. `graph` makes what is compared with single kernels."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_reward(Path(folder) / "rm", setup.reward, dtype=getattr(torch, setup.dtype))
        model = load_reward_model(
            find_classifier("rm", path),
            diffusion_tokenizer=Tokenizer.load(path),
            diffusion_vocab_size=setup.reward.vocab_size,
            dtype=getattr(torch, setup.dtype),
            device=device,
        )
    model.attention_backend = attention
    passes = graph(model)
    prefix = model.prefill(range(3, 3 + setup.cached))
    results = []
    for rows in setup.rows:
        count = rows * setup.tokens
        layout = model.layout([prefix] * rows, [setup.tokens] * rows)
        layout = layout.hiding(torch.full((rows,), setup.tokens - 8, device=device), layout.positions)
        embeds = model.table[torch.arange(count, device=device) % len(model.table)]
        plain = _milliseconds(device, setup.repeats, partial(differentiate, model, layout, embeds))
        graphs = _milliseconds(device, setup.repeats, partial(passes.run, layout, embeds))
        results.append({"rows": rows, "kernels": plain, "graphs": graphs, "gain": round(plain / graphs, 3)})
    return results


def _milliseconds(device: torch.device, repeats: int, run: Callable[[], Any]) -> float:
    """As the caller sees it, until the device is done; the first run is not counted."""
    best = float("inf")
    for repeat in range(repeats + 1):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if repeat:
            best = min(best, time.perf_counter() - started)
    return round(1e3 * best, 3)

"""The golden checkpoints, loaded once for the engine and once, through stock transformers, for the plain loop."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from server.guidance.plain import PlainLoop, PlainReward
from server.models.loading import LoadedDiffusionModel, load_diffusion_model
from server.rewards.reward_model import RewardModel, load_reward_model

GOLDEN = Path(__file__).parents[1] / "golden"


@dataclass(frozen=True)
class Pair:
    """A diffusion model, reward models by name, and the plain loop over the same weights."""

    loaded: LoadedDiffusionModel
    rewards: dict[str, RewardModel]
    plain: PlainLoop


def load_pair(family: str, dtype: torch.dtype) -> Pair:
    folder = GOLDEN / f"{family}-tiny"
    other = GOLDEN / ("llada-tiny" if family == "dream" else "dream-tiny")
    device = torch.device("cpu")
    loaded = load_diffusion_model(str(folder / "dlm"), dtype=dtype, device=device)
    rewards, plain = {}, {}
    for name, path in (("rm", folder / "rm"), ("other", other / "rm")):
        rewards[name] = load_reward_model(
            name,
            str(path),
            diffusion_tokenizer=loaded.tokenizer,
            diffusion_vocab_size=loaded.model.vocab_size,
            dtype=dtype,
            device=device,
        )
        stock = AutoModelForSequenceClassification.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
        stock.eval().requires_grad_(False)
        plain[name] = PlainReward(stock, rewards[name].tokenizer, rewards[name].table)
    return Pair(loaded, rewards, PlainLoop(loaded.model, loaded.tokenizer, loaded.info, plain))


@pytest.fixture(scope="session", params=["dream", "llada"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def pair64(family: str) -> Pair:
    return load_pair(family, torch.float64)


@pytest.fixture(scope="session")
def pair32(family: str) -> Pair:
    return load_pair(family, torch.float32)

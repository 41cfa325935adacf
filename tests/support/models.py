"""The golden checkpoints, loaded once a process for whoever asks for the same thing again.

What `diffusion`, `reward` and `pair` return is shared by all tests: a test that alters a model loads its own with
`load_diffusion` or `load_reward`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from server.guidance.plain import PlainLoop, PlainReward
from server.models import registry
from server.models.loading import LoadedDiffusionModel, load_diffusion_model
from server.models.packing import Prefix
from server.rewards.classifier import find_classifier
from server.rewards.reward_model import RewardModel, load_reward_model
from server.text.template import conversation_ids
from server.text.tokenizer import Tokenizer
from server.types import Message, RewardOutput

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
FAMILIES = tuple(each.family for each in registry.FAMILIES if (GOLDEN / f"{each.family}-tiny/units.json").is_file())
"""Names of the families of diffusion models whose logits are among the golden data, each in a folder NAME-tiny."""
BLOCK_CAUSAL = ("bd3lm", "sdar")
"""Golden models with block-causal attention, in such folders too. BD3LM's is an A2D model, which does not say it."""
CPU = torch.device("cpu")


def load_diffusion(family: str = "dream", dtype: torch.dtype = torch.float64, **options: Any) -> LoadedDiffusionModel:
    """A golden diffusion model of its own, on the CPU."""
    if family == "bd3lm":
        options = {"attention": "block_causal", **options}
    return load_diffusion_model(GOLDEN / f"{family}-tiny" / "dlm", dtype=dtype, **options)


def judge(family: str) -> str:
    """The family whose reward model the runs of a family were recorded with."""
    return family if (GOLDEN / f"{family}-tiny" / "rm").is_dir() else "dream"


@functools.cache
def tokenizer(family: str = "dream") -> Tokenizer:
    """A golden diffusion model's tokenizer."""
    return Tokenizer.load(GOLDEN / f"{family}-tiny" / "dlm")


def load_reward(
    family: str = "dream",
    dtype: torch.dtype = torch.float64,
    *,
    name: str = "rm",
    beside: str = "",
    folder: Path | None = None,
    attention: str = "",
    label: int | str | None = None,
    output: RewardOutput = "logit",
    **options: Any,
) -> RewardModel:
    """A reward model of its own, on the CPU: a family's golden one, or the one in `folder`. `beside` is the family of
    the diffusion model whose vocabulary it reads (the same family by default); `attention` replaces the implementation
    of attention that the loader chose; `label` and `output` are a source's in the settings; other options are the
    loader's."""
    read = tokenizer(beside or family)
    model = load_reward_model(
        find_classifier(name, folder or GOLDEN / f"{family}-tiny" / "rm", label, output),
        diffusion_tokenizer=read,
        diffusion_vocab_size=diffusion(beside or family).model.vocab_size,
        dtype=dtype,
        **{"device": CPU, **options},
    )
    if attention:
        model.attention_backend = attention
    return model


def whole(prefix: Prefix, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values (Hkv, length, d) of one layer, the parent's included."""
    links = prefix.chain()
    return torch.cat([link.keys[layer] for link in links], 1), torch.cat([link.values[layer] for link in links], 1)


def score_text(model: RewardModel, conversation: Sequence[Message], response: str) -> float:
    """R of a response, on the rendered conversation."""
    return float(model.score([conversation_ids(model.tokenizer, conversation, response)])[0])


diffusion = functools.cache(load_diffusion)
reward = functools.cache(load_reward)


class Around:
    """A model with something put around some of its methods; everything else is the model's own."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def allocate() -> None:
    """What no machine can give."""
    torch.empty(2**60, dtype=torch.uint8)


class Watched(Around):
    """A diffusion model that notes how many prompts, tokens and rows it is given each time. It runs out of memory when
    `fails` says so of what it is given now and all sizes of that kind, or raises what `fails` does."""

    def __init__(self, model: Any, fails: Callable[[str, list[int]], bool] = lambda what, sizes: False) -> None:
        super().__init__(model)
        self.fails = fails
        self.sizes: dict[str, list[int]] = {"prompts": [], "forward": [], "head": []}

    def _note(self, what: str, given: Any) -> None:
        self.sizes[what].append(len(given))
        if self.fails(what, self.sizes[what]):
            allocate()

    def prefill(self, prompts: Any, *arguments: Any) -> Any:
        self._note("prompts", prompts)
        return self.model.prefill(prompts, *arguments)

    def masked_hidden(self, tokens: Tensor, *arguments: Any) -> Any:
        self._note("forward", tokens)
        return self.model.masked_hidden(tokens, *arguments)

    def head(self, hidden: Tensor) -> Any:
        self._note("head", hidden)
        return self.model.head(hidden)


@dataclass(frozen=True)
class Pair:
    """A diffusion model, reward models by name (`rm`, and the other family's as `other`), and the plain loop over the
    same weights, with the reward models as stock transformers runs them."""

    loaded: LoadedDiffusionModel
    rewards: dict[str, RewardModel]
    plain: PlainLoop

    @property
    def blocks(self) -> dict[str, Any]:
        """What makes a job of this model block-causal, where the model is: `DiffusionParams` of the API, but for short
        blocks."""
        start = self.loaded.info.blocks_from
        return {"blocks_from": start, "block_length": 4, "schedule": "even"} if start else {}


@functools.cache
def pair(family: str, dtype: torch.dtype = torch.float64) -> Pair:
    """A golden diffusion model with both golden reward models."""
    loaded = diffusion(family, dtype)
    first = judge(family)
    rewards, plain = {}, {}
    for name, of in (("rm", first), ("other", "llada" if first == "dream" else "dream")):
        rewards[name] = reward(of, dtype, name=name, beside=family)
        folder = GOLDEN / f"{of}-tiny" / "rm"
        stock = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
        stock.eval().requires_grad_(False)
        plain[name] = PlainReward(stock, rewards[name].tokenizer, rewards[name].table, rewards[name].padding)
    return Pair(loaded, rewards, PlainLoop(loaded.model, loaded.tokenizer, loaded.info, plain))

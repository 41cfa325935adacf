"""A reward model that is an adapter's folder: the rewards of its base with the adapter's products in the weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from server.errors import ConfigurationError
from server.types import Message
from tests.support.lora import WEIGHTS, write_adapter, write_merged
from tests.support.models import GOLDEN, load_reward, score_text
from tests.support.rewards import edit_json

BASE = GOLDEN / "dream-tiny" / "rm"
ASKED = [Message("user", "Tell me about the licence.")]
HEAD = "score.weight"


def reward_of(folder: Path) -> float:
    return score_text(load_reward("dream", folder=folder), ASKED, "It is free.")


def with_head(folder: Path, head: torch.Tensor, base: Path = BASE) -> Path:
    """An adapter that holds the whole head, as PEFT saves those of sequence classifiers."""
    heads = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
    write_adapter(folder, BASE, base_model_name_or_path=str(base), **heads)
    save_file(load_file(folder / WEIGHTS) | {f"base_model.model.{HEAD}": head}, folder / WEIGHTS)
    return folder


def test_rewards_are_those_of_the_merged_weights_and_of_the_adapters_head(tmp_path: Path) -> None:
    plain = write_adapter(tmp_path / "plain", BASE, base_model_name_or_path=str(BASE))
    merged = write_merged(tmp_path / "merged", BASE, plain)
    expected = reward_of(merged)
    assert reward_of(plain) == pytest.approx(expected, abs=1e-9)
    assert abs(expected - reward_of(BASE)) > 1e-3
    head = torch.randn(1, 48, generator=torch.Generator().manual_seed(3))
    own = with_head(tmp_path / "head", head)
    save_file(load_file(merged / "model.safetensors") | {HEAD: head.double()}, merged / "model.safetensors")
    assert reward_of(own) == pytest.approx(reward_of(merged), abs=1e-9)


def test_the_base_may_be_a_language_model_where_the_adapter_brings_the_head(tmp_path: Path) -> None:
    tensors = load_file(BASE / "model.safetensors")
    head, base = tensors.pop(HEAD), Path(shutil.copytree(BASE, tmp_path / "lm"))
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    edit_json(base / "config.json", architectures=["Qwen3ForCausalLM"])
    own, usual = with_head(tmp_path / "own", head, base), with_head(tmp_path / "usual", head)
    assert reward_of(own) == reward_of(usual)
    plain = write_adapter(tmp_path / "headless", BASE, base_model_name_or_path=str(base))
    with pytest.raises(ConfigurationError, match=r"reward model rm: architectures: .* is no sequence classifier"):
        reward_of(plain)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"base_model_name_or_path": None}, "reward model rm: adapter_config.json: base_model_name_or_path"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["score"]}, "'score' names score"),
        ({"use_dora": True}, "use_dora"),
    ],
)
def test_what_is_wrong_with_a_reward_models_adapter_is_named(
    config: dict[str, Any], words: str, tmp_path: Path
) -> None:
    write_adapter(tmp_path, BASE, **{"base_model_name_or_path": str(BASE)} | config)
    with pytest.raises(ConfigurationError, match=words):
        reward_of(tmp_path)

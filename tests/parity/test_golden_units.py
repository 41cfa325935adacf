"""Gradients, steered logits and rewards of single denoising steps against the authors' records.

Bounds are those of tests/golden/README.md: rewards to 1e-5, gradients by norm to 1e-4, phi only where all three
recorded gradients exceed 1e-4 in size (to 1e-3), since an Adam step is nearly the sign of the gradient.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from server.types import Message
from tests.support.models import FAMILIES, GOLDEN, Pair
from tests.support.steering import OneCanvas

CASES = range(16)


def has_gradients(family: str) -> bool:
    """Whether more than logits was recorded."""
    return isinstance(json.loads((GOLDEN / f"{family}-tiny" / "units.json").read_text()), dict)


def recorded(pair: Pair, family: str, number: int) -> tuple[dict[str, Any], dict[str, Tensor], OneCanvas]:
    """A case, the tensors of all cases, and the case's canvas."""
    folder = GOLDEN / f"{family}-tiny"
    case = json.loads((folder / "units.json").read_text())["cases"][number]
    tensors = load_file(folder / "units.safetensors")
    prompt_length = len(pair.loaded.tokenizer.render_chat((Message("user", case["prompt"]),)))
    response = tensors[f"{case['index']}.canvas"][prompt_length:]
    canvas = OneCanvas(
        pair, case["prompt"], response, tau=case["temperature"], top_p=case["top_p"], eta=case["eta"]
    )  # fmt: skip
    return case, tensors, canvas


@pytest.mark.parametrize("number", CASES)
@pytest.mark.parametrize("family", list(filter(has_gradients, FAMILIES)), scope="session")
def test_logits_gradients_rewards_and_steered_logits(pair64: Any, family: str, number: int) -> None:
    case, tensors, canvas = recorded(pair64, family, number)
    expected = tensors[f"{case['index']}.logits_masked"]
    torch.testing.assert_close(canvas.logits, expected, rtol=0, atol=1e-5)
    steered, phi, gradients = canvas.steer(case["method"], case["gradient_steps"])
    rewards = [float(reward) for reward in steered.rewards]
    assert rewards == pytest.approx(case["rewards_before_each_step"], abs=1e-5)
    wanted = [tensors[f"{case['key']}.grad{step + 1}"].double() for step in range(case["gradient_steps"])]
    for got, want in zip(gradients, wanted, strict=True):
        assert (got - want).norm() <= 1e-4 * want.norm()
    clear = torch.stack([gradient.abs() > 1e-4 for gradient in wanted]).all(0)
    assert clear.any() or all(gradient.norm() < 1 for gradient in wanted)
    difference = (phi - tensors[f"{case['key']}.phi"]).abs()[clear]
    assert difference.numel() == 0 or difference.max() <= 1e-3

"""Gradients, steered logits and rewards of single denoising steps against the authors' records.

Bounds are those of tests/golden/README.md: rewards to 1e-5, gradients by norm to 1e-4, phi only where all three
recorded gradients exceed 1e-4 in size (to 1e-3), since an Adam step is nearly the sign of the gradient.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import kernels
from server.diffusion.schedule import plan
from server.guidance.assembly import Objective, Responses, Timings
from server.guidance.prefixes import RewardContext
from server.guidance.steer import steer
from server.models.packing import PackedLayout
from server.text.template import split_at_response
from server.types import DiffusionParams, GuidanceParams, Message
from tests.support.models import score_text

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = range(16)


def unit(family: str, number: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    folder = GOLDEN / f"{family}-tiny"
    case = json.loads((folder / "units.json").read_text())["cases"][number]
    return case, load_file(folder / "units.safetensors")


def setup(pair: Any, family: str, number: int) -> dict[str, Any]:
    """The kernel state, the responses and the objective of one recorded canvas."""
    case, tensors = unit(family, number)
    canvas = tensors[f"{case['index']}.canvas"]
    prompt = (Message("user", case["prompt"]),)
    prompt_length = len(pair.loaded.tokenizer.render_chat(prompt))
    response = canvas[prompt_length:]
    masked = response == pair.loaded.info.mask_token_id
    rows = torch.nonzero(masked)[:, 0]
    layout = PackedLayout.of((len(canvas),), canvas.device)
    with torch.no_grad():
        logits = pair.loaded.model.masked_logits(canvas, layout, rows + prompt_length)
    count = len(rows)
    full = torch.ones(count, dtype=logits.dtype)
    params = kernels.RowParams(
        tau=full * case["temperature"],
        top_p=full * case["top_p"],
        top_k=torch.ones(count, dtype=torch.long),  # one kept token: argmax draws, as recorded
        greedy=torch.zeros(count, dtype=torch.bool),
        eta=full * case["eta"],
    )
    reward = pair.rewards["rm"]
    before, after = split_at_response(reward.tokenizer, prompt)
    return {
        "case": case,
        "tensors": tensors,
        "logits": logits,
        "params": params,
        "responses": Responses.of(
            [response.numpy()],
            [rows.numpy()],
            response.device,
            eos_token_id=pair.loaded.info.eos_token_id,
            pad_token_id=pair.loaded.info.pad_token_id,
        ),
        "objective": Objective(reward, (RewardContext.of(reward, before, after),), torch.ones(1, dtype=torch.float64)),
    }


@pytest.mark.parametrize("number", CASES)
def test_masked_logits(pair64: Any, family: str, number: int) -> None:
    given = setup(pair64, family, number)
    expected = given["tensors"][f"{given['case']['index']}.logits_masked"]
    torch.testing.assert_close(given["logits"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("number", CASES)
def test_gradients_rewards_and_steered_logits(
    pair64: Any, family: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = setup(pair64, family, number)
    case, tensors, params = given["case"], given["tensors"], given["params"]
    state = kernels.begin(given["logits"], params)
    gradients: list[Tensor] = []
    update = kernels.update

    def record(state: Any, terms: Any) -> None:
        # dr/dphi = (1/tau) q (g E^T - g . soft): the closed form of algorithm.md, in plain torch.
        q = torch.softmax(state.phi() / params.tau[:, None], dim=-1)
        dq = sum(term.g @ term.table.T - (term.g * term.soft).sum(-1, keepdim=True) for term in terms)
        gradients.append(q * dq / params.tau[:, None])
        update(state, terms)

    monkeypatch.setattr(kernels, "update", record)
    steered = steer(
        state,
        given["responses"],
        [given["objective"]],
        [case["method"]],
        plan(1, DiffusionParams(1), GuidanceParams()),
        lambda inner: torch.zeros(len(params.tau), 4, dtype=torch.long),
        case["gradient_steps"],
        eos_token_id=pair64.loaded.info.eos_token_id,
        pad_token_id=pair64.loaded.info.pad_token_id,
        timings=Timings(),
    )
    rewards = [float(reward) for reward in steered.rewards]
    assert rewards == pytest.approx(case["rewards_before_each_step"], abs=1e-5)
    recorded = [tensors[f"{case['key']}.grad{step + 1}"].double() for step in range(case["gradient_steps"])]
    for got, want in zip(gradients, recorded, strict=True):
        assert (got - want).norm() <= 1e-4 * want.norm()
    clear = torch.stack([gradient.abs() > 1e-4 for gradient in recorded]).all(0)
    assert clear.any() or all(gradient.norm() < 1 for gradient in recorded)
    difference = (state.phi() - tensors[f"{case['key']}.phi"]).abs()[clear]
    assert difference.numel() == 0 or difference.max() <= 1e-3


def test_final_rewards_of_given_texts(pair64: Any, family: str) -> None:
    scores = json.loads((GOLDEN / f"{family}-tiny" / "units.json").read_text())["scores"]
    reward = pair64.rewards["rm"]
    for entry in scores:
        got = score_text(reward, (Message("user", entry["prompt"]),), entry["response"])
        assert got == pytest.approx(entry["reward"], abs=1e-5)

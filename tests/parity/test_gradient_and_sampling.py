"""The whole gradient against finite differences, and the whole sampler against the exact distribution."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from server.guidance.distributions import filtered_distribution, weighted_rows
from server.methods import METHODS, gradient_methods
from server.models.packing import PackedLayout
from tests.support.jobs import make_job, run
from tests.support.models import Pair
from tests.support.steering import STEP, OneCanvas

PROMPT = "Explain the copyright notice."


class Problem(OneCanvas):
    """One step's guidance on a canvas with a few committed tokens, as a function of phi_0 alone."""

    def __init__(self, pair: Pair, method: str, length: int = 6) -> None:
        info = pair.loaded.info
        response = torch.full((length,), info.mask_token_id)
        response[1] = 40
        super().__init__(pair, PROMPT, response, tau=0.7, top_p=1.0, eta=1.0)
        self.pair, self.method = pair, method
        self.logits[:, [info.eos_token_id, info.pad_token_id]] -= 20.0  # no position hidden: keeps R smooth

    def reward(self, phi: Tensor, w: Tensor, hard: Tensor, soft_at_phi0: Tensor) -> float:
        """R by stock transformers with the stop-gradient held fixed: e = soft(phi) + w (hard - soft(phi_0))."""
        plain = self.pair.plain.rewards["rm"]
        soft = torch.softmax(phi / self.tau, dim=-1) @ plain.table
        embeds = plain.table[self.response].index_put((self.rows,), soft + w * (hard - soft_at_phi0))
        sequence = torch.cat([plain.own(self.before), embeds, plain.own(self.after)])
        with torch.no_grad():
            return float(plain.read(sequence, torch.ones(len(sequence), dtype=torch.bool)))

    def finite_difference(self, direction: Tensor, step: float = 3e-6) -> float:
        """Central difference of the reward along a direction of phi."""
        plain = self.pair.plain.rewards["rm"]
        w = METHODS[self.method].weigh(weighted_rows(self.logits, self.tau, STEP))[:, None]
        hard = plain.table[self.logits.argmax(-1)]
        soft = torch.softmax(self.logits / self.tau, dim=-1) @ plain.table
        up = self.reward(self.logits + step * direction, w, hard, soft)
        down = self.reward(self.logits - step * direction, w, hard, soft)
        return (up - down) / (2 * step)


@pytest.mark.usefixtures("exact_qwen3_norms")
@pytest.mark.parametrize("method", gradient_methods())
def test_gradient_agrees_with_finite_differences(pair64: Any, method: str) -> None:
    problem = Problem(pair64, method)
    (gradient,) = problem.steer(method, 1)[2]
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(gradient.shape, generator=generator, dtype=torch.float64) for _ in range(8)]
    directions.append(gradient / gradient.norm())
    assert gradient.norm() > 1e-3
    for direction in directions:
        exact = float((gradient * direction).sum())
        assert problem.finite_difference(direction) == pytest.approx(exact, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1.0, 1.0, None), (0.7, 0.9, None), (1.5, 0.95, 12), (0.5, 0.6, None)]
)
def test_drawn_tokens_follow_the_exact_distribution(
    pair64: Any, temperature: float, top_p: float, top_k: int | None
) -> None:
    """One-token canvases, many trajectories: counts against the filtered softmax of the model's logits."""
    tokenizer, info = pair64.loaded.tokenizer, pair64.loaded.info
    job = make_job(
        "job", PROMPT, tokenizer, max_tokens=1, temperature=temperature, top_p=top_p, top_k=top_k,
        n=4000, best_of=4000, seed=11,
    )  # fmt: skip
    tokens = [trajectory.token_ids[0] for trajectory in run(pair64, [job])[job.id].trajectories]
    canvas = torch.tensor([*job.prompt_ids, info.mask_token_id])
    with torch.no_grad():
        logits = pair64.loaded.model.masked_logits(
            canvas, PackedLayout.of((len(canvas),), canvas.device), torch.tensor([len(canvas) - 1])
        )
    probability = filtered_distribution(logits, temperature, top_p, top_k)[1][0].numpy()
    counts = Counter(tokens)
    assert all(probability[token] > 0 for token in counts)  # nothing outside the nucleus, ever
    common = np.flatnonzero(probability * len(tokens) >= 8)
    observed = [counts[int(token)] for token in common]
    expected = list(probability[common] * len(tokens))
    if len(tokens) - sum(observed) or sum(expected) < len(tokens) - 1e-6:
        observed.append(len(tokens) - sum(observed))
        expected.append(len(tokens) - sum(expected))
    assert sum(observed) == len(tokens) == 4000
    if len(observed) > 1:
        assert chisquare(observed, expected).pvalue > 1e-4

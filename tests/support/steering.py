"""The guidance of one denoising step on one canvas, as the engine's loop computes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from server.diffusion.schedule import plan
from server.guidance.assembly import Objective, Responses, Timings
from server.guidance.prefixes import RewardContext
from server.guidance.steer import Steered, steer
from server.models.packing import PackedLayout
from server.text.template import split_at_response
from server.types import DiffusionParams, GuidanceParams, Message
from tests.support.models import Pair

STEP = plan(1, DiffusionParams(1), GuidanceParams())[0]


class OneCanvas:
    """A pair's view of a prompt and a response (L,), masked where it holds the mask token: the logits (N, V) of its
    masked `rows` (N,), what the reward model `rm` reads, and the steering by its reward. Draws are argmax draws."""

    def __init__(self, pair: Pair, prompt: str, response: Tensor, *, tau: float, top_p: float, eta: float) -> None:
        info, message = pair.loaded.info, (Message("user", prompt),)
        before = torch.tensor(pair.loaded.tokenizer.render_chat(message))
        canvas = torch.cat([before, response])
        self.response, self.tau = response, tau
        self.rows = torch.nonzero(response == info.mask_token_id)[:, 0]
        with torch.no_grad():
            layout = PackedLayout.of((len(canvas),), canvas.device)
            self.logits = pair.loaded.model.masked_logits(canvas, layout, self.rows + len(before))
        count = len(self.rows)
        full = torch.ones(count, dtype=self.logits.dtype)
        self.params = kernels.RowParams(
            tau=full * tau,
            top_p=full * top_p,
            top_k=torch.ones(count, dtype=torch.long),
            greedy=torch.zeros(count, dtype=torch.bool),
            eta=full * eta,
        )
        self.responses = Responses.of(
            [response.numpy()], [self.rows.numpy()],
            eos_token_id=info.eos_token_id, pad_token_id=info.pad_token_id,
        )  # fmt: skip
        reward = pair.rewards["rm"]
        self.before, self.after = split_at_response(reward.tokenizer, message)
        (context,) = RewardContext.of(reward, [(self.before, self.after)])
        self.objective = Objective(reward, (context,), torch.ones(1, dtype=torch.float64))

    def steer(self, method: str, gradient_steps: int) -> tuple[Steered, Tensor, list[Tensor]]:
        """What the loop reports, phi (N, V) after it, and dr/dphi (N, V) before each of its steps. Adam leaves little
        of a gradient but its sign, so this is taken from the terms that the loop hands to the kernels."""
        state = kernels.begin(self.logits, self.params)
        gradients: list[Tensor] = []
        update = kernels.update

        def record(state: Any, terms: Any) -> None:
            # dr/dphi = (1/tau) q (g E^T - g . soft): the closed form of algorithm.md, in plain torch.
            q = torch.softmax(state.phi() / self.tau, dim=-1)
            dq = sum(term.g @ term.table.T - (term.g * term.soft).sum(-1, keepdim=True) for term in terms)
            gradients.append(q * dq / self.tau)
            update(state, terms)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "update", record)
            keys = torch.zeros(len(self.rows), 4, dtype=torch.long)
            steered = steer(
                state, self.responses, [self.objective], [method], [STEP], lambda inner: keys, gradient_steps,
                timings=Timings(),
            )  # fmt: skip
        return steered, state.phi(), gradients

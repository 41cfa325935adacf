"""Reward prefixes that grow with the settled beginning of a response: same rewards, same gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from server.guidance.assembly import Objective, Responses, Timings, assemble
from server.guidance.prefixes import GROW_BY, RewardContext, grow
from server.guidance.steer import visible_positions
from server.rewards.reward_model import RewardModel, load_reward_model
from server.text.template import split_at_response
from server.text.tokenizer import Tokenizer
from server.types import Message

GOLDEN = Path(__file__).parents[1] / "golden/dream-tiny"
EOS, PAD = 7, 9
LENGTH = 24


@pytest.fixture(scope="module")
def model() -> RewardModel:
    return load_reward_model(
        "rm",
        GOLDEN / "rm",
        diffusion_tokenizer=Tokenizer.load(GOLDEN / "dlm"),
        diffusion_vocab_size=520,
        dtype=torch.float64,
        device=torch.device("cpu"),
    )


def contexts(model: RewardModel, count: int) -> list[RewardContext]:
    """Two conversations in turn, each context shared by its trajectories."""
    split = [
        split_at_response(model.tokenizer, (Message("user", text),)) for text in ("Hello", "Write about the licence.")
    ]
    of = [RewardContext.of(model.prefill(before), after) for before, after in split]
    return [of[index % 2] for index in range(count)]


def read(
    model: RewardModel, known: list[RewardContext], canvases: list[np.ndarray], settled: list[int]
) -> tuple[Tensor, Tensor]:
    """Rewards (B,) and dr/de of the masked rows, everything behind `settled` being masked."""
    responses = Responses.of(
        canvases, [np.arange(stop, LENGTH) for stop in settled], torch.device("cpu"), eos_token_id=EOS, pad_token_id=PAD
    )
    generator = torch.Generator().manual_seed(3)
    embeds = torch.randn(len(responses.masked), model.hidden_size, generator=generator, dtype=torch.float64)
    visible = visible_positions(responses.committed, responses.first, EOS, PAD)
    objective = Objective(model, tuple(known), torch.ones(len(canvases), dtype=torch.float64))
    return assemble(objective, responses).read(embeds, visible, Timings(), gradient=True)


def test_growing_changes_no_reward_and_no_gradient(model: RewardModel) -> None:
    rng = np.random.default_rng(5)
    canvases = [rng.integers(20, 500, LENGTH) for _ in range(6)]
    settled = [0, GROW_BY - 1, GROW_BY, 15, 17, 23]
    canvases[3][[2, 11]] = PAD  # hidden, inside the settled part
    canvases[4][10] = EOS  # nothing behind it is seen
    canvases[5][20] = PAD
    before = contexts(model, len(canvases))
    grown = grow(model, before, canvases, settled, EOS, PAD)
    assert [context.settled for context in grown] == [0, 0, GROW_BY, 15, 17, 23]
    added = [after.prefix.length - first.prefix.length for after, first in zip(grown, before, strict=True)]
    assert added == [0, 0, GROW_BY, 13, 11, 22]
    exact, expected = read(model, grown, canvases, settled), read(model, before, canvases, settled)
    torch.testing.assert_close(exact[0], expected[0], rtol=1e-6, atol=1e-6)  # norms round to float32 inside
    torch.testing.assert_close(exact[1], expected[1], rtol=1e-5, atol=1e-6)
    assert float(expected[1].abs().max()) > 1e-3


def test_growing_in_two_steps_is_growing_at_once_and_shares_the_conversation(model: RewardModel) -> None:
    canvas = np.arange(100, 100 + LENGTH)
    start = contexts(model, 1)
    once = grow(model, start, [canvas], [20], EOS, PAD)
    twice = grow(model, grow(model, start, [canvas], [9], EOS, PAD), [canvas], [20], EOS, PAD)
    assert once[0].prefix.length == twice[0].prefix.length == start[0].prefix.length + 20
    assert once[0].prefix.parent is twice[0].prefix.parent is start[0].prefix
    for layer in range(len(once[0].prefix.keys)):
        assert once[0].prefix.keys[layer].shape[1] == 20  # the conversation's are not held again
        for values in (False, True):
            torch.testing.assert_close(
                once[0].prefix.whole(layer, values=values), twice[0].prefix.whole(layer, values=values),
                rtol=1e-6, atol=1e-6,
            )  # fmt: skip


def test_uncached_leads_do_not_grow(model: RewardModel) -> None:
    before, after = split_at_response(model.tokenizer, (Message("user", "Hello"),))
    known = [RewardContext.of(model.prefill(()), after, before)]
    assert grow(model, known, [np.arange(100, 100 + LENGTH)], [20], EOS, PAD) == known

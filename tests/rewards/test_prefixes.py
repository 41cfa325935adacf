"""Reward prefixes that grow with the settled beginning of a response: same rewards, same gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from server.guidance.prefixes import GROW_BY, RewardContext, grow
from server.rewards.reward_model import RewardModel
from tests.support.models import reward, whole
from tests.support.rewards import EOS, PAD, Pass, contexts, embeddings

LENGTH = 24


@pytest.fixture
def model() -> RewardModel:
    return reward()


def read(
    model: RewardModel, known: list[RewardContext], canvases: list[np.ndarray], settled: list[int]
) -> tuple[Tensor, Tensor]:
    """Rewards (B,) and dr/de of the masked rows, everything after `settled` being masked."""
    one = Pass(model, known, canvases, [np.arange(stop, LENGTH) for stop in settled])
    return one.read(embeddings(model, len(one.responses.masked)))


def test_growing_changes_no_reward_and_no_gradient(model: RewardModel) -> None:
    rng = np.random.default_rng(5)
    canvases = [rng.integers(20, 500, LENGTH) for _ in range(6)]
    settled = [0, GROW_BY - 1, GROW_BY, 15, 17, 23]
    canvases[3][[2, 11]] = PAD  # hidden, inside the settled part
    canvases[4][10] = EOS  # nothing after it is seen
    canvases[5][20] = PAD
    before = contexts(model, len(canvases))
    grown = grow(model, before, canvases, settled, EOS, PAD)
    assert [context.settled for context in grown] == [0, 0, GROW_BY, 15, 17, 23]
    added = [after.prefix.length - first.prefix.length for after, first in zip(grown, before, strict=True)]
    assert added == [0, 0, GROW_BY, 13, 11, 22]
    exact, expected = read(model, grown, canvases, settled), read(model, before, canvases, settled)
    torch.testing.assert_close(exact[0], expected[0], rtol=0, atol=1e-11)
    torch.testing.assert_close(exact[1], expected[1], rtol=1e-9, atol=1e-11)
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
        for one, other in zip(whole(once[0].prefix, layer), whole(twice[0].prefix, layer), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)

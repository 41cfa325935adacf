"""Two ways to keep hidden positions from the reward model, left out or moved after the others: same rewards, same
gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.guidance.prefixes import RewardContext, grow
from server.models.packing import EMPTY_PREFIX
from server.rewards.reward_model import RewardModel
from server.rewards.trunk import Wrapped
from tests.support.models import load_reward
from tests.support.rewards import EOS, PAD, Pass, contexts, embeddings

pytestmark = pytest.mark.usefixtures("exact_qwen3_norms")


def load(*, written_out: bool) -> RewardModel:
    """With a variable-length attention by its specification; written out, or as transformers runs it."""
    loaded = load_reward(attention="reference")
    if not written_out:
        loaded._trunk = Wrapped(loaded._network.model)
    return loaded


@pytest.fixture(scope="module", params=[True, False], ids=["trunk", "transformers"])
def model(request: pytest.FixtureRequest) -> RewardModel:
    return load(written_out=request.param)


def both_ways(
    model: RewardModel, known: list[RewardContext], canvases: list[Any], positions: list[Any], seed: int = 3
) -> list[tuple[Tensor, Tensor]]:
    """Rewards (B,) and dr/de (N, D) by each way; embeddings that stand for hidden positions are absurd in the second,
    so that whatever reads them shows."""
    one = Pass(model, known, canvases, positions)
    embeds = embeddings(model, len(one.responses.masked), seed)
    absurd = torch.where(one.visible[one.responses.masked][:, None], embeds, 1e6 * embeds)
    ways = []
    for backend, values in (("sdpa", embeds), ("reference", absurd)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "attention_backend", backend)
            assert (one.assembled()[1].layout is None) == (backend == "sdpa")  # the way follows the attention
            ways.append(one.read(values))
    return ways


def assert_same(ways: list[tuple[Tensor, Tensor]]) -> None:
    (rewards, g), (other_rewards, other_g) = ways
    torch.testing.assert_close(other_rewards, rewards, rtol=0, atol=1e-10)
    torch.testing.assert_close(other_g, g, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("cached", [True, False])
def test_rewards_and_gradients_are_the_same(model: RewardModel, cached: bool) -> None:
    rng = np.random.default_rng(5)
    lengths = [24, 9, 24, 16, 24, 1, 12]
    canvases = [rng.integers(20, 500, length) for length in lengths]
    positions = [np.arange(stop, length) for stop, length in zip([3, 0, 10, 5, 23, 0, 4], lengths, strict=True)]
    canvases[0][[4, 7, 20]] = PAD  # masked and hidden
    canvases[1][:] = PAD  # nothing of the response is seen
    canvases[2][12] = EOS  # the rest is not
    canvases[3][0] = EOS
    canvases[4][[2, 11]] = PAD  # revealed and hidden
    canvases[6][[4, 6, 8]] = [EOS, EOS, PAD]
    known = contexts(model, len(canvases), cached=cached)
    if cached:
        known = grow(model, known, canvases, [int(masked[0]) for masked in positions], EOS, PAD)
        assert {context.settled for context in known} == {0, 10, 23}
    ways = both_ways(model, known, canvases, positions)
    assert_same(ways)
    g, one = ways[1][1], Pass(model, known, canvases, positions)
    hidden = ~one.visible[one.responses.masked]
    assert 20 < int(hidden.sum()) < len(hidden)
    assert not g[hidden].any()  # exactly
    assert float(g[~hidden].abs().amax(dim=1).min()) > 1e-9


@settings(max_examples=25, deadline=None)
@given(
    canvases=st.lists(
        st.lists(st.sampled_from([EOS, PAD, 30, 41, 77, 400]), min_size=1, max_size=10), min_size=1, max_size=4
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_responses_read_the_same(model: RewardModel, canvases: list[list[int]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    arrays = [np.array(canvas) for canvas in canvases]
    positions = [np.flatnonzero(rng.random(len(canvas)) < 0.6) for canvas in canvases]
    positions[0] = np.union1d(positions[0], [0])
    assert_same(both_ways(model, contexts(model, len(canvases)), arrays, positions, seed % 1000))


def test_what_revealed_tokens_hide_is_never_computed(model: RewardModel) -> None:
    """Nothing behind a revealed EOS can be seen in this step: it is left out of the rows, by either way."""
    canvases = [np.array([30, 41, EOS, 50, PAD, 60]), np.array([30, EOS, 41, PAD, 50, 60])]
    positions = [np.array([1, 3, 5]), np.array([1, 4])]  # the second EOS is only what a masked position may become
    known = contexts(model, 2)
    one = Pass(model, known, canvases, positions)
    assert one.responses.hidden.reshape(2, 6).tolist() == [[False] * 3 + [True] * 3, [False] * 3 + [True] + [False] * 2]
    _, assembly = one.assembled()
    assert assembly.places.lengths == (3 + len(known[0].suffix_ids), 5 + len(known[1].suffix_ids))
    assert (assembly.places.place >= 0).tolist() == [True, False, False, True, True]
    assert_same(both_ways(model, known, canvases, positions))


def test_a_row_of_which_nothing_is_seen_has_no_reward(model: RewardModel) -> None:
    """No template of ours ends with the response; one that did must not be given another row's reward."""
    known = RewardContext.of(model, [((), ())] * 2)
    one = Pass(model, known, [np.array([PAD, PAD]), np.array([30, 41])], [np.array([0, 1]), np.array([1])])
    rewards, _ = one.read(embeddings(model, 3), gradient=False)
    assert rewards.isfinite().tolist() == [False, True]


def test_only_a_variable_length_attention_hides(model: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "attention_backend", "sdpa")
    layout = model.layout([EMPTY_PREFIX], [3])
    with pytest.raises(ValueError, match="only a variable-length attention"):
        model.read(layout.hiding(torch.tensor([2]), layout.positions), torch.zeros(3, model.hidden_size).double())

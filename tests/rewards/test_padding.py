"""Where R is read when a chat template ends in the padding token: where transformers reads it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from server.guidance.plain import PlainLoop, PlainReward
from server.guidance.prefixes import GROW_BY, RewardContext, grow
from server.rewards.reward_model import RewardModel
from server.text.template import conversation_ids, split_at_response
from server.types import Message
from tests.support import models
from tests.support.jobs import make_job, run
from tests.support.models import load_reward, score_text
from tests.support.rewards import EOS, Pass, embeddings, load_stock, write_reward_model

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IM_END = 2  # of both tokenizers; the template's last token
MASKED_FROM = 12
ASKED = (Message("user", "Tell me about the licence."),)


@pytest.fixture(scope="module", params=[IM_END, None, -1], ids=["pad = end of turn", "no pad", "pad = -1"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[RewardModel, Any]:
    """Ours, and transformers', of a Llama whose padding closes the turn; and of two that have none."""
    folder = write_reward_model(
        tmp_path_factory.mktemp("rm") / "rm", "llama", template=TEMPLATE, pad_token_id=request.param
    )
    return load_reward(folder=folder), load_stock(folder)


def test_scores_are_transformers(pair: tuple[RewardModel, Any]) -> None:
    ours, stock = pair
    sequences = [conversation_ids(ours.tokenizer, ASKED, text) for text in ("It is free.", "")]
    assert all(ids[-1] == IM_END for ids in sequences)
    sequences += [[5, IM_END, 6, 7], [5, 6, IM_END, IM_END, IM_END], [8, 9], [IM_END, IM_END]]
    expected = torch.stack([stock(input_ids=torch.tensor([ids])).logits[0, 0] for ids in sequences])
    torch.testing.assert_close(ours.score(sequences), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        torch.tensor([score_text(ours, ASKED, "It is free.")], dtype=torch.float64), expected[:1], rtol=0, atol=1e-4
    )


def expected_pass(stock: Any, ids: torch.Tensor, embeds: torch.Tensor, seen: torch.Tensor) -> tuple[Any, Any]:
    """The reward of one sequence and its gradient; what transformers reads of the ids that are seen, of embeddings."""
    pad = stock.config.pad_token_id
    content = torch.nonzero(seen & (ids != pad) if pad is not None else seen)[:, 0]
    x = embeds.clone().requires_grad_()
    hidden = stock.model(
        inputs_embeds=x[None], attention_mask=seen[None].long(), position_ids=torch.arange(len(ids))[None]
    ).last_hidden_state
    reward = stock.score(hidden[0, content[-1]])[0]
    return reward.detach(), torch.autograd.grad(reward, [x])[0]


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("grows", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_guidance_reads_the_same_place(
    pair: tuple[RewardModel, Any], backend: str, grows: bool, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Responses that end in padding, in hidden positions, or hold nothing but these, and some of them settled."""
    ours, stock = pair
    monkeypatch.setattr(ours, "attention_backend", backend)
    before, after = split_at_response(ours.tokenizer, ASKED)
    assert after == [IM_END]
    rng = np.random.default_rng(3)
    canvases = [rng.integers(20, 400, 16) for _ in range(6)]
    canvases[1][14:] = IM_END  # the response's last tokens are R's padding
    canvases[2][13] = EOS  # what follows is hidden
    canvases[3][:] = IM_END
    canvases[4][[3, 10, 11]] = IM_END  # settled, inside and at the end of what may go into the prefix
    canvases[5][0] = EOS
    positions = [np.arange(MASKED_FROM, 16) for _ in canvases]
    diffusion_pad = 8
    (context,) = RewardContext.of(ours, [(before, after)], cached=cached)
    known = [context] * len(canvases)
    if grows:
        known = grow(ours, known, canvases, [MASKED_FROM] * len(canvases), EOS, diffusion_pad)
        assert (known[0].settled >= GROW_BY) == cached
    one = Pass(ours, known, canvases, positions, diffusion_pad)
    tokens, visible, embeds = one.responses.committed, one.visible, embeddings(ours, len(one.responses.masked))
    rewards, g = one.read(embeds)
    own = {string: ours.tokenizer.id_of(string) for string in models.tokenizer().vocab()}
    ids_of = {index: own[string] for string, index in models.tokenizer().vocab().items()}
    for row, canvas in enumerate(canvases):
        here = slice(16 * row, 16 * row + 16)
        response = ours.table[tokens[here]].clone()
        response[MASKED_FROM:] = embeds[4 * row : 4 * row + 4]
        whole = torch.cat(
            [ours.own_embeddings(torch.tensor(before)), response, ours.own_embeddings(torch.tensor(after))]
        )
        ids = torch.tensor([*before, *(ids_of[token] for token in canvas.tolist()), *after])
        seen = torch.cat([torch.ones(len(before)).bool(), visible[here], torch.ones(1).bool()])
        reward, gradient = expected_pass(stock, ids, whole, seen)
        torch.testing.assert_close(rewards[row], reward, rtol=0, atol=1e-4)
        expected = gradient[len(before) + MASKED_FROM : len(before) + 16]
        torch.testing.assert_close(g[4 * row : 4 * row + 4], expected, rtol=1e-3, atol=1e-4)


def test_the_engine_follows_the_plain_loop(pair: tuple[RewardModel, Any]) -> None:
    ours, stock = pair
    golden = models.pair("dream")
    plain = PlainLoop(
        golden.loaded.model, golden.loaded.tokenizer, golden.loaded.info,
        {"rm": PlainReward(stock, ours.tokenizer, ours.table, ours.padding)},
    )  # fmt: skip
    job = make_job(
        prompt=ASKED[0].content, tokenizer=golden.loaded.tokenizer, method="entrgi", max_tokens=24, best_of=2, seed=5
    )
    got, expected = run(golden, [job], rewards={"rm": ours})[job.id], plain.run(job)
    assert [list(one.token_ids) for one in got.trajectories] == expected.token_ids
    assert [one.reward for one in got.trajectories] == pytest.approx(expected.rewards, abs=1e-4)

"""Checkpoints that are hard on the last draw, the same in the engine and in the plain loop: one that likes the mask
token, which never is the answer, and one whose logits are in 16 bits, whatever this machine's processor can do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from server.guidance.plain import PlainLoop
from tests.support.jobs import make_job, run
from tests.support.models import Around, Pair


class Altered(Around):
    """A diffusion model with other logits; both loops see the same ones."""

    def __init__(self, model: Any, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__(model)
        self.change = change

    def head(self, hidden: Tensor) -> Tensor:
        return self.change(self.model.head(hidden))

    def masked_logits(self, *arguments: Any) -> Tensor:
        return self.head(self.model.masked_hidden(*arguments))


def altered(pair: Pair, change: Callable[[Tensor], Tensor]) -> Pair:
    model: Any = Altered(pair.loaded.model, change)
    loaded = replace(pair.loaded, model=model)
    return replace(pair, loaded=loaded, plain=PlainLoop(model, loaded.tokenizer, loaded.info, pair.plain.rewards))


CASES: dict[str, dict[str, Any]] = {
    "none": {"best_of": 2, "n": 2},
    "greedy": {"temperature": 0.0},
    "nothing else is kept": {"top_k": 1},
    "two are kept": {"top_k": 2, "top_p": 1.0},
    "maskgit_plus": {"algorithm": "maskgit_plus", "top_k": 3},
    "topk_margin, cfg": {"algorithm": "topk_margin", "cfg_scale": 0.5},
    "origin": {"algorithm": "origin", "temperature": 1.3},
    "threshold": {"algorithm": "threshold", "confidence_threshold": 0.5},
    "entrgi": {"method": "entrgi", "gradient_steps": 2},
    "entrgi, guided confidence, greedy": {
        "method": "entrgi", "gradient_steps": 2, "confidence": "guided", "temperature": 0.0,
    },
    "aps, blocks": {"method": "aps", "gradient_steps": 1, "block_length": 4},
}  # fmt: skip


@pytest.mark.parametrize("liking", [0.0, 3.0, 900.0])
def test_the_mask_token_is_never_the_answer(pair64: Pair, liking: float) -> None:
    mask = pair64.loaded.info.mask_token_id

    def like(logits: Tensor) -> Tensor:
        logits[:, mask] = logits.logsumexp(-1) + liking  # not by as much more than the next one everywhere
        return logits

    pair = altered(pair64, like)
    jobs = [
        make_job(name, tokenizer=pair.loaded.tokenizer, seed=index, **values)
        for index, (name, values) in enumerate(CASES.items())
    ]
    results = run(pair, jobs)
    for job in jobs:
        tokens = [list(trajectory.token_ids) for trajectory in results[job.id].trajectories]
        assert tokens == pair.plain.run(job).token_ids, job.id
        assert not any(mask in ids for ids in tokens), job.id


@pytest.mark.parametrize("values", [{"top_p": 1.0}, {"method": "entrgi", "gradient_steps": 2}, {"temperature": 0.0}])
def test_logits_in_16_bits_are_decoded_in_32(pair64: Pair, values: dict[str, Any]) -> None:
    pair = altered(pair64, lambda logits: logits.bfloat16())
    job = make_job("job", tokenizer=pair.loaded.tokenizer, seed=4, **values)
    (trajectory,) = run(pair, [job])[job.id].trajectories
    assert [list(trajectory.token_ids)] == pair.plain.run(job).token_ids

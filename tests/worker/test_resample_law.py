"""Resampling gives the law that it promises: on a model so small that every text can be counted, the weighted particles
follow p(x) exp(strength x s(x)). Without their last weights they do not."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from server.budget import Budget
from server.types import JobResult, Resampling, WeightedReward
from server.wire.messages import Ask, Finished, Judged
from server.worker.runner import Runner
from tests.support.jobs import make_job
from tests.support.models import diffusion

LENGTH, PROMPT, COUNT, RUNS = 4, (5, 6), 96, 10
IDS = (36, 37, 38)  # A, B, C
MASK = 39
LOADED = diffusion("dream")
RANDOM = np.random.default_rng(0)
LAW = RANDOM.dirichlet(np.full(len(IDS) ** LENGTH, 0.3)).reshape((len(IDS),) * LENGTH)
PLACES = {LOADED.tokenizer.decode([IDS[i] for i in places]): places for places in np.ndindex(LAW.shape)}
REWARD = dict(zip(PLACES, RANDOM.normal(size=len(PLACES)).tolist(), strict=True))


@functools.cache
def conditionals(canvas: tuple[int, ...]) -> Tensor:
    """Logits (L, V) of each token given those that are revealed; what cannot be is left out."""
    given = LAW[
        tuple(slice(None) if token == MASK else slice(IDS.index(token), IDS.index(token) + 1) for token in canvas)
    ]
    logits = torch.full((LENGTH, MASK + 2), -math.inf, dtype=torch.float64)
    for place in range(LENGTH):
        others = tuple(axis for axis in range(LENGTH) if axis != place)
        logits[place, list(IDS)] = torch.from_numpy(np.broadcast_to(given.sum(others), len(IDS)).copy()).log()
    return logits


class Table:
    """A diffusion model that knows the law of four tokens, and takes no notice of its prompt."""

    device, vocab_size = torch.device("cpu"), MASK + 2

    def masked_hidden(self, tokens: Tensor, layout: Any, rows: Tensor, kept: Any) -> Tensor:
        canvases = tokens.view(-1, len(PROMPT) + LENGTH)[:, len(PROMPT) :].tolist()
        whole = torch.stack([conditionals(tuple(canvas)) for canvas in canvases])
        return whole[rows // (len(PROMPT) + LENGTH), rows % (len(PROMPT) + LENGTH) - len(PROMPT)]

    def head(self, hidden: Tensor) -> Tensor:
        return hidden


def results(rule: Resampling) -> list[JobResult]:
    """Runs of many particles, alike but for their seeds."""
    model: Any = Table()
    info = replace(LOADED.info, mask_token_id=MASK, eos_token_id=MASK + 1, pad_token_id=MASK + 1, stop_token_ids=())
    runner = Runner(replace(LOADED, model=model, info=info), {}, budget=Budget(trajectories=2 * COUNT))
    scorers = (WeightedReward("table"),) if rule.by == "reward" else ()
    values = {"max_tokens": LENGTH, "schedule": "even", "temperature": 1.0, "top_p": 1.0, "n": COUNT, "best_of": COUNT}
    for seed in range(RUNS):
        runner.add(make_job(f"{seed}", prompt_ids=PROMPT, seed=seed, resample=rule, scorers=scorers, **values), now=0.0)
    found = []
    while runner.has_work:
        for event in runner.step():
            if isinstance(event, Ask):
                judged = {"table": [REWARD[text] for text in event.texts]}
                runner.judged(Judged(event.job_id, event.step, judged))
            elif isinstance(event, Finished):
                found.append(event.result)
    return found


def measured(result: JobResult, weights: Any) -> np.ndarray[Any, Any]:
    """For each place and token, the weight of the particles that have it there; (L, 3)."""
    found = np.zeros((LENGTH, len(IDS)))
    for particle, weight in zip(result.trajectories, weights, strict=True):
        found[range(LENGTH), PLACES[particle.text]] += weight
    return found


@pytest.mark.parametrize(
    "rule",
    [
        Resampling(every=2, strength=0.8, threshold=1.0),
        Resampling(every=1, strength=0.8, potential="max", threshold=1.0),
        Resampling("confidence", every=2, strength=0.7, threshold=1.0),
    ],
    ids=["difference", "max", "confidence"],
)
def test_weighted_particles_follow_the_tilted_law(rule: Resampling) -> None:
    score = {text: REWARD[text] if rule.by == "reward" else math.log(LAW[ids]) for text, ids in PLACES.items()}
    exact = np.zeros((LENGTH, len(IDS)))
    for text, places in PLACES.items():
        exact[range(LENGTH), places] += LAW[places] * math.exp(rule.strength * score[text])
    exact /= exact[0].sum()
    runs = results(rule)
    assert all(run.resampled for run in runs)

    def deviation(found: list[np.ndarray[Any, Any]]) -> float:
        """The largest one, in standard errors."""
        error = np.std(found, axis=0, ddof=1) / math.sqrt(RUNS)
        return float(np.abs((np.mean(found, axis=0) - exact) / error).max())

    assert deviation([measured(run, run.weights) for run in runs]) < 4
    assert deviation([measured(run, [1 / COUNT] * COUNT) for run in runs]) > 6

"""The walk down a ranking gives what ranking all candidates at once gives, though it draws fewer of them."""

from __future__ import annotations

import numpy as np
import pytest

from server.diffusion.sampler import reveal_adaptively, reveal_most_confident
from server.diffusion.schedule import Step
from server.types import DiffusionParams, Job, SamplingParams
from server.worker.group import IntArray
from server.worker.pack import Member, Trajectory
from server.worker.reveal import _known

EOS, WORD = 1, 2
PARAMS = {
    "entropy": DiffusionParams(20),
    "entropy, no EOS rule": DiffusionParams(20, deprioritize_eos=False),
    "entropy_bound": DiffusionParams(20, "entropy_bound", entropy_bound=0.4),
    "entropy_bound of 0": DiffusionParams(20, "entropy_bound", entropy_bound=0.0),
    "entropy_bound, no EOS rule": DiffusionParams(20, "entropy_bound", entropy_bound=0.4, deprioritize_eos=False),
    "threshold": DiffusionParams(20, "threshold", confidence_threshold=0.7),
}


def walk(diffusion: DiffusionParams, confidence: np.ndarray, drawn: IntArray, step: Step) -> tuple[list[int], int]:
    """The rows revealed, and how many were drawn on the way."""
    size = len(drawn)
    job = Job("job", (5,), SamplingParams(size), diffusion)
    member = Member(Trajectory.start(job, 0, 0), step, np.arange(size), np.arange(size))
    order = np.argsort(-confidence, kind="stable")
    tokens = np.full(size, -1)
    while True:
        chosen, missing = _known(member, order, tokens, confidence, EOS)
        if not len(missing):
            return sorted(chosen.tolist()), int((tokens >= 0).sum())
        assert (tokens[missing] < 0).all()
        tokens[missing] = drawn[missing]


@pytest.mark.parametrize("name", list(PARAMS))
def test_walking_equals_ranking_everything(name: str) -> None:
    diffusion = PARAMS[name]
    rng = np.random.default_rng(0)
    saved = 0
    for _ in range(1000):
        size = int(rng.integers(1, 9))
        drawn = np.where(rng.random(size) < rng.random(), EOS, WORD)
        confidence = rng.random(size) if diffusion.algorithm == "threshold" else -rng.exponential(0.3, size)
        reveal, left = int(rng.integers(0, size + 1)), int(rng.integers(0, size + 1))
        step = Step(0, 1.0, 0, size, 1 if diffusion.adaptive else reveal, left, 0.0, True)
        chosen, count = walk(diffusion, confidence, drawn, step)
        if diffusion.adaptive:
            expected = reveal_adaptively(confidence, drawn == EOS, step.least(size), diffusion)
        else:
            expected = reveal_most_confident(
                confidence, drawn == EOS, reveal, deprioritize_eos=diffusion.deprioritize_eos
            )
        assert chosen == expected.tolist()
        saved += size - count
    assert saved > 100  # rows that need not be drawn

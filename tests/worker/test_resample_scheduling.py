"""Whatever jobs come, are cancelled, run out of time or wait for outside scorers, under budgets that barely hold one of
them: everything ends, no budget is exceeded, the trajectories that are resampled run together, and nothing changes a
token."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from server.budget import Budget
from server.types import Job, Resampling, WeightedReward
from server.wire.messages import Ask, Failed, Finished, Judged
from server.worker.runner import Runner
from tests.support.jobs import make_job
from tests.support.models import diffusion, reward

LOADED, REWARD = diffusion("dream"), reward("dream")
OUTSIDE = {"scorers": (WeightedReward("length"),)}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bon": {"method": "bon", **OUTSIDE},
    "guided": {"method": "entrgi", "gradient_steps": 1},
    "smc": {"method": "bon", "resample": Resampling(every=2)},
    "smc, outside": {"method": "bon", "reward_models": (), "resample": Resampling(every=2, threshold=1.0), **OUTSIDE},
    "entrgi, outside": {"method": "entrgi", "gradient_steps": 1, "resample": Resampling(every=1), **OUTSIDE},
    "confidence": {"resample": Resampling("confidence", every=1)},
    "origin, outside": {"algorithm": "origin", "resample": Resampling(every=1, strength=9.0, threshold=1.0), **OUTSIDE},
}
SPECS = st.lists(
    st.tuples(
        st.sampled_from(sorted(KINDS)),
        st.integers(2, 3),  # best_of
        st.integers(0, 1),  # priority
        st.integers(0, 12),  # the step at which it comes
        st.none() | st.integers(1, 12),  # and after how many it is cancelled
        st.none() | st.integers(1, 12),  # or its deadline is
    ),
    max_size=6,
)


@functools.cache
def job(kind: str, best_of: int) -> Job:
    return make_job(
        kind, prompt_ids=(5, 6, 7), max_tokens=5, temperature=1.0, n=best_of, best_of=best_of, **KINDS[kind]
    )


COST = Runner(LOADED, {"rm": REWARD}).demand.cost(job("guided", 3))
BUDGET = Budget(trajectories=3, tokens=3 * COST.tokens, cached_tokens=COST.cached_tokens + 3 * COST.grown_tokens)
"""Three trajectories of the dearest kind."""


def judged(ask: Ask) -> Judged:
    return Judged(ask.job_id, ask.step, {"length": [float(len(text)) for text in ask.texts]})


@functools.cache
def alone(kind: str, best_of: int) -> list[tuple[int, ...]]:
    """The tokens of a job that nothing disturbs."""
    runner = Runner(LOADED, {"rm": REWARD})
    runner.add(job(kind, best_of), now=0.0)
    while True:
        for event in runner.step():
            if isinstance(event, Ask):
                runner.judged(judged(event))
            elif isinstance(event, Finished):
                return [each.token_ids for each in event.result.trajectories]


@settings(deadline=None, max_examples=25)
@given(SPECS, st.randoms(use_true_random=False))
def test_everything_ends_within_the_budget_and_as_it_would_alone(specs: list[tuple[Any, ...]], order: Any) -> None:
    now = 0
    runner = Runner(LOADED, {"rm": REWARD}, budget=BUDGET, clock=lambda: float(now))
    deadlines, waiting, ended, cancelled = dict[str, int](), list[Ask](), dict[str, Any](), set[str]()
    last = max([0, *(spec[3] for spec in specs)])
    while now <= last or runner.has_work or waiting:
        for name, (kind, best_of, priority, arrival, cancels, limit) in enumerate(specs):
            job_id = str(name)
            if arrival == now:
                deadlines[job_id] = arrival + limit if limit else 1000
                runner.add(replace(job(kind, best_of), id=job_id, priority=priority, deadline=deadlines[job_id]), now)
            elif cancels and arrival + cancels == now and runner.cancel(job_id):
                cancelled.add(job_id)
        for event in runner.step() if runner.has_work else ():
            if isinstance(event, Ask):
                waiting.append(event)
            elif isinstance(event, Finished | Failed):
                assert event.job_id not in ended.keys() | cancelled
                ended[event.job_id] = event
        entries = list(runner.book)
        assert runner.stats.running == sum(entry.holding for entry in entries) <= BUDGET.trajectories
        assert sum(entry.holding * entry.cost.tokens for entry in entries) <= BUDGET.tokens
        shared = sum(entry.cost.cached_tokens for entry in entries if entry.caches)
        grown = sum(entry.holding * entry.cost.grown_tokens for entry in entries)
        assert shared + grown <= BUDGET.cached_tokens
        assert all(entry.holding >= 0 for entry in entries)
        for entry in entries:
            if entry.job.guidance.resample:
                assert entry.holding in (0, entry.job.sampling.best_of)
            if entry.asked is not None:
                assert (entry.holding, entry.waiting, entry.contexts) == (0, 0, {})
        for ask in list(waiting):
            late = now >= deadlines[ask.job_id]
            if late or order.random() < 0.4:
                waiting.remove(ask)
                runner.judged(Judged(ask.job_id, ask.step, None) if late else judged(ask))
        now += 1
        assert now < 400, "somebody waits for ever"
    assert not len(runner.book)
    assert ended.keys() | cancelled == {str(name) for name in range(len(specs))}
    for name, event in ended.items():
        kind, best_of, *_, limit = specs[int(name)]
        if limit is None:
            assert [each.token_ids for each in event.result.trajectories] == alone(kind, best_of)

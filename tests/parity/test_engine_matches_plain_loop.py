"""The engine gives the plain loop's tokens for any mix of requests, alone and in a crowd."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from server.engine.messages import Failed, Finished
from server.engine.runner import Runner
from server.types import (
    DiffusionParams,
    GuidanceParams,
    Job,
    JobResult,
    Message,
    SamplingParams,
    WeightedReward,
)

PROMPTS = ("Hi", "Explain the copyright notice.", "Tell me about the licence of this software.")
ONE = (WeightedReward("rm"),)
TWO = (WeightedReward("rm", 1.0), WeightedReward("other", -0.5))


def make_job(pair: Any, index: int, **changes: Any) -> Job:
    """A chat job on one of three prompts; `changes` go to whichever parameter block has the name."""
    conversation = (Message("user", PROMPTS[index % len(PROMPTS)]),)
    values: dict[str, Any] = {"max_tokens": 8, "steps": 8, "seed": 1000 + index} | changes
    blocks = []
    for kind in (SamplingParams, DiffusionParams, GuidanceParams):
        names = set(kind.__dataclass_fields__) - ({"stop"} if kind is SamplingParams else set())
        blocks.append(kind(**{name: values.pop(name) for name in list(values) if name in names}))
    job = Job(
        id=f"job-{index}",
        prompt_ids=tuple(pair.loaded.tokenizer.render_chat(conversation)),
        conversation=conversation,
        sampling=blocks[0],
        diffusion=blocks[1],
        guidance=blocks[2],
    )
    return replace(job, **values)


def gradient(method: str, **changes: Any) -> dict[str, Any]:
    return {"method": method, "reward_models": ONE, "gradient_steps": 2, "best_of": 2} | changes


CASES: dict[str, dict[str, Any]] = {
    "none": {"n": 2, "best_of": 2},
    "none, scored, greedy": {"temperature": 0.0, "reward_models": ONE},
    "bon": {"method": "bon", "reward_models": ONE, "best_of": 3},
    "expectation": gradient("expectation"),
    "aps": gradient("aps", top_p=0.8),
    "entrgi": gradient("entrgi"),
    "entrgi, M = 3, eta 1": gradient("entrgi", gradient_steps=3, eta=1.0, best_of=1),
    "entrgi, M = 0": gradient("entrgi", gradient_steps=0),
    "entrgi, greedy": gradient("entrgi", temperature=0.0, best_of=1),
    "entrgi, top_k": gradient("entrgi", top_k=5, top_p=1.0),
    "entrgi, guided confidence": gradient("entrgi", confidence="guided"),
    "entrgi, maskgit_plus": gradient("entrgi", algorithm="maskgit_plus"),
    "entrgi, topk_margin": gradient("entrgi", algorithm="topk_margin"),
    "entrgi, origin": gradient("entrgi", algorithm="origin", steps=6),
    "entrgi, ranking temperature": gradient("entrgi", algorithm_temperature=0.5),
    "entrgi, no EOS rule": gradient("entrgi", deprioritize_eos=False),
    "entrgi, blocks, even": gradient("entrgi", block_length=3, schedule="even", max_tokens=10, steps=7),
    "entrgi, blocks, linear": gradient("entrgi", block_length=4, max_tokens=10, steps=9),
    "entrgi, guided window": gradient("entrgi", start=0.25, stop=0.9, every=2, max_tokens=10, steps=10),
    "entrgi, cfg": gradient("entrgi", cfg_scale=1.5),
    "none, cfg, blocks": {"cfg_scale": 0.5, "block_length": 4, "max_tokens": 10, "steps": 6},
    "entrgi, few steps": gradient("entrgi", steps=3, max_tokens=12),
    "entrgi, many steps": gradient("entrgi", steps=20, max_tokens=6),
    "aps, two rewards": gradient("aps", reward_models=TWO),
    "entrgi, other reward": gradient("entrgi", reward_models=(WeightedReward("other"),)),
    "entrgi, suffix": gradient("entrgi", suffix_ids=(40, 50, 60), response_suffix=" and so on"),
    "none, maskgit_plus, top_k": {"algorithm": "maskgit_plus", "top_k": 20, "temperature": 1.2},
    "none, origin": {"algorithm": "origin", "top_p": 0.5},
    "second prompt of a request": gradient("entrgi", prompt_index=3),
}


def run(pair: Any, jobs: Iterable[Job]) -> dict[str, JobResult]:
    """All jobs at once through a fresh engine."""
    runner = Runner(pair.loaded, pair.rewards)
    for job in jobs:
        runner.add(job, now=0.0)
    results = {}
    while runner.has_work:
        for event in runner.step():
            assert not isinstance(event, Failed), event
            if isinstance(event, Finished):
                results[event.job_id] = event.result
    assert runner.scheduler.running_trajectories == runner.scheduler.waiting_trajectories == 0
    return results


def all_jobs(pair: Any) -> list[Job]:
    return [make_job(pair, index, **changes) for index, changes in enumerate(CASES.values())]


@pytest.fixture(scope="session")
def crowd(pair64: Any) -> dict[str, JobResult]:
    """Every case in one crowd, in a shuffled order."""
    jobs = all_jobs(pair64)
    random.Random(0).shuffle(jobs)
    return run(pair64, jobs)


@pytest.mark.parametrize("case", list(CASES))
def test_tokens_rewards_and_choice_equal_the_plain_loop_in_float64(pair64: Any, crowd: Any, case: str) -> None:
    index = list(CASES).index(case)
    job = make_job(pair64, index, **CASES[case])
    expected = pair64.plain.run(job)
    for result in (crowd[job.id], run(pair64, [job])[job.id]):
        assert [list(trajectory.token_ids) for trajectory in result.trajectories] == expected.token_ids
        assert [trajectory.text for trajectory in result.trajectories] == expected.texts
        assert result.chosen == expected.chosen
        for trajectory, reward in zip(result.trajectories, expected.rewards, strict=True):
            assert trajectory.reward == (reward if reward is None else pytest.approx(reward, abs=1e-4))


def test_a_change_of_seed_changes_the_tokens(pair64: Any) -> None:
    job = make_job(pair64, 0, temperature=1.0, top_p=1.0)
    drawn = {
        run(pair64, [replace(job, sampling=replace(job.sampling, seed=seed))])[job.id].trajectories[0].token_ids
        for seed in range(4)
    }
    assert len(drawn) == 4


def test_the_trajectories_of_a_job_differ(pair64: Any) -> None:
    job = make_job(pair64, 0, temperature=1.0, top_p=1.0, n=4, best_of=4)
    result = run(pair64, [job])[job.id]
    assert len({trajectory.token_ids for trajectory in result.trajectories}) == 4


def test_float32_differs_from_float64_only_after_near_ties(pair32: Any, pair64: Any, record_property: Any) -> None:
    """In float32 the share of equal trajectories is reported; most must agree on these tiny models."""
    single, double = run(pair32, all_jobs(pair32)), run(pair64, all_jobs(pair64))
    pairs = list(
        itertools.chain.from_iterable(
            zip(single[job_id].trajectories, double[job_id].trajectories, strict=True) for job_id in single
        )
    )
    share = sum(a.token_ids == b.token_ids for a, b in pairs) / len(pairs)
    record_property("float32_share_of_equal_trajectories", share)
    print(f"float32: {share:.3f} of {len(pairs)} trajectories have float64's tokens")
    assert share > 0.8

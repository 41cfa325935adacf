"""The engine gives the plain loop's tokens for any mix of requests, alone and in a crowd."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from server.guidance.plain import PlainLoop
from server.methods import gradient_methods
from server.types import DiffusionParams, Job, JobResult, WeightedReward
from server.wire.messages import Canvas
from server.worker.runner import Runner
from server.worker.savings import Savings
from server.worker.step import Denoiser
from server.worker.trajectory import Trajectory
from tests.support import jobs as support
from tests.support.jobs import run
from tests.support.models import BLOCK_CAUSAL, FAMILIES, Around

everywhere = pytest.mark.parametrize("family", [*FAMILIES, *BLOCK_CAUSAL], scope="session")
PROMPTS = ("Hi", "Explain the copyright notice.", "Tell me about the licence of this software.")
ONE = (WeightedReward("rm"),)
TWO = (WeightedReward("rm", 1.0), WeightedReward("other", -0.5))


def make_job(pair: Any, index: int, **changes: Any) -> Job:
    """A chat job on one of three prompts; with a block-causal model, of what a case asks the part that it can do."""
    prompt = PROMPTS[index % len(PROMPTS)]
    if pair.blocks:
        changes = pair.blocks | {name: value for name, value in changes.items() if name not in FULL_ATTENTION}
    own = {"seed": 1000 + index, "return_step_map": True} | changes
    return support.make_job(f"job-{index}", prompt, pair.loaded.tokenizer, **own)


def gradient(method: str, **changes: Any) -> dict[str, Any]:
    return {"method": method, "reward_models": ONE, "gradient_steps": 2, "best_of": 2} | changes


def adaptive(algorithm: str, **changes: Any) -> dict[str, Any]:
    """A run of 12 tokens under a rule that neither reveals everything at once nor one position a step."""
    rule = {"entropy_bound": 3.0} if algorithm == "entropy_bound" else {"confidence_threshold": 0.25}
    return {"algorithm": algorithm, "max_tokens": 12, "steps": 12, **rule, **changes}


FULL_ATTENTION = ("cfg_scale", "suffix_ids", "response_suffix")
CASES: dict[str, dict[str, Any]] = {
    "none": {"n": 2, "best_of": 2},
    "none, scored, greedy": {"temperature": 0.0, "reward_models": ONE},
    "bon": {"method": "bon", "reward_models": ONE, "best_of": 3},
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
    "none, entropy_bound": adaptive("entropy_bound", n=2, best_of=2),
    "none, threshold, greedy": adaptive("threshold", temperature=0.0),
    "entrgi, entropy_bound": gradient("entrgi", **adaptive("entropy_bound")),
    "entrgi, entropy_bound, guided confidence": gradient("entrgi", **adaptive("entropy_bound", confidence="guided")),
    "entrgi, entropy_bound, cold": gradient("entrgi", **adaptive("entropy_bound", temperature=0.2, entropy_bound=0.1)),
    "entrgi, entropy_bound, few steps": gradient("entrgi", **adaptive("entropy_bound", entropy_bound=0.5, steps=4)),
    "entrgi, entropy_bound, window, cfg": gradient(
        "entrgi", **adaptive("entropy_bound", start=0.1, stop=0.8, every=2, cfg_scale=0.5)
    ),
    "aps, threshold": gradient("aps", **adaptive("threshold")),
    "entrgi, threshold, guided confidence": gradient("entrgi", **adaptive("threshold", confidence="guided")),
    "entrgi, threshold, blocks": gradient("entrgi", **adaptive("threshold", block_length=5, schedule="even")),
    "entrgi, threshold, no EOS rule": gradient("entrgi", **adaptive("threshold", deprioritize_eos=False)),
    "entrgi, prefill": gradient("entrgi", response_prefix="The answer: ", response_suffix=" and so on"),
    # Last, so that another method changes no other case's seed.
    **{method: gradient(method, top_p=0.8) for method in gradient_methods()},
}


def all_jobs(pair: Any) -> list[Job]:
    return [make_job(pair, index, **changes) for index, changes in enumerate(CASES.values())]


@pytest.fixture(scope="session")
def crowd(pair64: Any) -> dict[str, JobResult]:
    """Every case in one crowd, in a shuffled order."""
    jobs = all_jobs(pair64)
    random.Random(0).shuffle(jobs)
    return run(pair64, jobs)


@everywhere
@pytest.mark.parametrize("case", list(CASES))
def test_tokens_steps_rewards_and_choice_equal_the_plain_loop_in_float64(pair64: Any, crowd: Any, case: str) -> None:
    index = list(CASES).index(case)
    job = make_job(pair64, index, **CASES[case])
    expected = pair64.plain.run(job)
    for result in (crowd[job.id], run(pair64, [job])[job.id]):
        assert [list(trajectory.token_ids) for trajectory in result.trajectories] == expected.token_ids
        assert [list(trajectory.step_map) for trajectory in result.trajectories] == expected.step_maps
        assert [trajectory.text for trajectory in result.trajectories] == expected.texts
        assert result.chosen == expected.chosen
        for trajectory, reward in zip(result.trajectories, expected.rewards, strict=True):
            assert trajectory.reward == (reward if reward is None else pytest.approx(reward, abs=1e-4))


@pytest.mark.parametrize(
    ("one_at_a_time", "ranking"),
    [
        (gradient("entrgi", algorithm="entropy_bound", entropy_bound=0.0), "entropy"),
        # The whole vocabulary: positions at which the filters keep one token have no entropy, and would go together.
        ({"algorithm": "entropy_bound", "entropy_bound": 0.0, "top_p": 1.0}, "entropy"),
        ({"algorithm": "threshold", "confidence_threshold": 1.0, "temperature": 0.0}, "maskgit_plus"),
    ],
)
def test_rules_that_allow_one_token_a_step_equal_the_exact_ranking(
    pair64: Any, one_at_a_time: dict[str, Any], ranking: str
) -> None:
    adaptive_job = make_job(pair64, 1, schedule="even", **one_at_a_time)
    exact_job = replace(adaptive_job, diffusion=DiffusionParams(8, ranking, schedule="even"))  # type: ignore[arg-type]
    adaptive_run, exact_run = (run(pair64, [job])[job.id] for job in (adaptive_job, exact_job))
    assert adaptive_run.trajectories == exact_run.trajectories
    assert adaptive_run.steps == exact_run.steps == 8


@pytest.mark.parametrize("algorithm", ["entropy_bound", "threshold"])
def test_adaptive_runs_end_early_and_report_the_steps_that_they_took(crowd: Any, algorithm: str) -> None:
    taken = []
    for index, case in enumerate(CASES.values()):
        if case.get("algorithm") == algorithm:
            result = crowd[f"job-{index}"]
            assert 1 <= result.steps <= case["steps"]
            assert result.model_calls == result.steps * (2 if "cfg_scale" in case else 1)
            taken.append(result.steps)
    assert min(taken) < max(taken)  # how many depends on the run; a text that is final ends it as well
    assert min(taken) < 12


@everywhere
@pytest.mark.parametrize("name", [field.name for field in fields(Savings) if field.name != "leave_when_final"])
def test_every_saving_is_exact(pair64: Any, crowd: Any, name: str) -> None:
    if name == "block_cache" and not pair64.blocks:
        pytest.skip("there is nothing to cache")
    without = run(pair64, all_jobs(pair64), savings=Savings.without([name]))
    for job_id, result in crowd.items():
        same = [trajectory.token_ids for trajectory in without[job_id].trajectories]
        assert same == [trajectory.token_ids for trajectory in result.trajectories]


@pytest.fixture(scope="session")
def ending(pair64: Any) -> Any:
    """The same models where every other token ends a text."""
    info = replace(pair64.loaded.info, stop_token_ids=tuple(range(0, pair64.loaded.info.vocab_size, 2)))
    loaded = replace(pair64.loaded, info=info)
    plain = PlainLoop(loaded.model, loaded.tokenizer, info, pair64.plain.rewards)
    return replace(pair64, loaded=loaded, plain=plain)


ENDING = ("none", "bon", "entrgi, blocks, even", "none, cfg, blocks", "aps, two rewards", "none, origin")
ENDING += ("entrgi, suffix", "entrgi, entropy_bound", "entrgi, maskgit_plus")
TEXT_ONLY = {"return_token_ids": False, "return_step_map": False}


@pytest.mark.parametrize("case", ENDING)
def test_a_trajectory_whose_text_is_final_leaves_and_answers_the_same(ending: Any, case: str) -> None:
    job = make_job(ending, 0, **{**TEXT_ONLY, **CASES[case], "best_of": 4, "n": 4, "max_tokens": 12, "steps": 12})
    left = run(ending, [job])[job.id]
    stayed = run(ending, [job], savings=Savings.without(["leave_when_final"]))[job.id]
    expected = ending.plain.run(job)
    for result in (left, stayed):
        assert [trajectory.text for trajectory in result.trajectories] == expected.texts
        assert result.chosen == expected.chosen
        for trajectory, reward in zip(result.trajectories, expected.rewards, strict=True):
            assert trajectory.reward == (reward if reward is None else pytest.approx(reward, abs=1e-4))
    for early, late in zip(left.trajectories, stayed.trajectories, strict=True):
        assert (early.completion_tokens, early.finish_reason) == (late.completion_tokens, late.finish_reason)
        assert early.model_calls <= late.model_calls
    if "origin" not in case:  # which reveals at random, and may come to the text's end at its last step
        assert sum(each.model_calls for each in left.trajectories) < sum(
            each.model_calls for each in stayed.trajectories
        )


@pytest.mark.parametrize("asked", ["return_token_ids", "return_step_map", "trace", "ignore_eos", "stream_canvas"])
def test_whoever_asks_for_more_than_a_text_gets_the_whole_canvas(ending: Any, asked: str) -> None:
    jobs = [make_job(ending, 0, **{**TEXT_ONLY, "n": 4, "best_of": 4, **changes}) for changes in ({}, {asked: True})]
    early, whole = ([trajectory.token_ids for trajectory in run(ending, [job])[job.id].trajectories] for job in jobs)
    mask = ending.loaded.info.mask_token_id
    assert any(mask in token_ids for token_ids in early)
    assert not any(mask in token_ids for token_ids in whole)


def canvases(pair: Any, jobs: Iterable[Job]) -> dict[tuple[str, int], dict[int, list[int]]]:
    """The canvas of every trajectory after each of its steps, -1 where masked."""
    runner = Runner(pair.loaded, pair.rewards)
    for job in jobs:
        runner.add(replace(job, stream_canvas=True), now=0.0)
    seen: dict[tuple[str, int], dict[int, list[int]]] = {}
    while runner.has_work:
        for event in runner.step():
            if isinstance(event, Canvas):
                seen.setdefault((event.job_id, event.trajectory), {})[event.step] = event.token_ids
    return seen


class Shaken(Around):
    """A diffusion model whose logits carry relative noise of the size of float32 rounding."""

    def __init__(self, model: Any, generator: torch.Generator) -> None:
        super().__init__(model)
        self.generator = generator

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.model.head(hidden)
        noise = torch.randn(logits.shape, generator=self.generator, dtype=logits.dtype)
        return logits * (1 + 1e-6 * noise) + 1e-6 * noise


def step_from(pair: Any, model: Any, job: Job, index: int, step: int, taken: int, before: list[int]) -> tuple[Any, ...]:
    """What one step reveals from a given canvas, `taken` steps into the run."""
    contexts = Runner(pair.loaded, pair.rewards).demand.contexts([job])[0]
    trajectory = Trajectory.start(job, index, pair.loaded.info, contexts)
    for position, token in enumerate(before):
        if token >= 0:
            trajectory.tokens[position], trajectory.masked[position] = token, False
    trajectory.cursor, trajectory.taken = step, taken
    planned = trajectory.next_step()
    assert planned is not None
    assert planned.index == step
    (decision,) = Denoiser(model, pair.loaded.info, pair.rewards).step([(trajectory, planned)])
    return tuple(zip(decision.chosen.tolist(), decision.tokens.tolist(), strict=True))


def test_float32_differs_from_float64_only_after_near_ties(pair32: Any, pair64: Any) -> None:
    """The share of equal trajectories, and for each other: the float64 step at which they first differ is decided by
    less than float32 rounding, for it comes out in several ways when the logits are shaken by that much."""
    jobs = {job.id: job for job in all_jobs(pair64)}
    single, double = canvases(pair32, jobs.values()), canvases(pair64, jobs.values())
    different = [key for key in double if single[key] != double[key]]
    share = 1 - len(different) / len(double)
    print(f"float32: {share:.3f} of {len(double)} trajectories have float64's tokens; different: {different}")
    assert share > 0.8
    for job_id, index in different:
        job, steps = jobs[job_id], double[job_id, index]
        first = next(step for step in steps if single[job_id, index].get(step) != steps[step])
        earlier = [step for step in steps if step < first]
        before = steps[earlier[-1]] if earlier else [-1] * job.sampling.max_tokens
        model = Shaken(pair64.loaded.model, torch.Generator().manual_seed(0))
        outcomes = {step_from(pair64, model, job, index, first, len(earlier), before) for _ in range(40)}
        assert len(outcomes) > 1, f"{job_id}, trajectory {index} differs at step {first}, and not by a near tie"


def test_shaken_steps_are_steady_where_no_tie_is_near(pair64: Any) -> None:
    """The test above can fail: an ordinary step comes out the same under the same noise."""
    job = make_job(pair64, 0)
    model = Shaken(pair64.loaded.model, torch.Generator().manual_seed(0))
    before = [-1] * job.sampling.max_tokens
    (outcome,) = {step_from(pair64, model, job, 0, 1, 0, before) for _ in range(20)}
    assert len(outcome) == 1  # one position: step 0 would reveal none

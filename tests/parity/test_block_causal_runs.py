"""What block-causal decoding has of its own: a prompt that is run once, a cache that grows by finished blocks, an
answer that ends with the block in which its text ends, and positions past the answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from server.budget import Budget
from server.errors import InvalidRequest
from server.types import Job
from server.wire.messages import Canvas, Finished, Progress
from server.worker.runner import Runner
from tests.support import jobs as support
from tests.support.jobs import answers, run
from tests.support.models import BLOCK_CAUSAL, Watched

pytestmark = pytest.mark.parametrize("family", BLOCK_CAUSAL, scope="session")
PROMPT = "Tell me about the licence of this software."


def make_job(pair: Any, name: str, prompt: str = PROMPT, **changes: Any) -> Job:
    return support.make_job(name, prompt, pair.loaded.tokenizer, **pair.blocks | {"max_tokens": 14} | changes)


def watched(pair: Any, model: Any, **options: Any) -> Runner:
    return Runner(replace(pair.loaded, model=model), pair.rewards, **options)


def test_all_trajectories_share_one_prompt_and_a_step_reads_two_blocks_at_most(pair64: Any) -> None:
    job = make_job(pair64, "three", method="entrgi", gradient_steps=1, best_of=3, temperature=1.2)
    expected = [each.token_ids for each in run(pair64, [job])[job.id].trajectories]
    for budget in (Budget(), Budget(trajectories=1)):  # at once, and in parts
        model = Watched(pair64.loaded.model)
        assert answers(watched(pair64, model, budget=budget), [job]) == ({job.id: expected}, {})
        assert sum(model.sizes["prompts"]) == 1
        assert max(model.sizes["forward"]) <= 2 * 4 * min(3, budget.trajectories)


def test_the_cache_is_admitted_by_its_tokens(pair64: Any) -> None:
    jobs = [make_job(pair64, str(seed), seed=seed) for seed in range(3)]
    needed = len(jobs[0].prompt_ids) + 14
    runner = Runner(pair64.loaded, {}, budget=Budget(cached_tokens=2 * needed), largest=Budget())
    for job in jobs:
        runner.add(job, 0.0)
    finished, most = {}, 0
    while runner.has_work:
        finished |= {event.job_id: event.result for event in runner.step() if isinstance(event, Finished)}
        most = max(most, runner.stats.running)
    assert most == 2
    together = run(pair64, jobs)
    for name, result in finished.items():
        assert [each.token_ids for each in result.trajectories] == [
            each.token_ids for each in together[name].trajectories
        ]
    with pytest.raises(InvalidRequest, match=f"takes {needed} cached tokens"):
        Runner(pair64.loaded, {}, budget=Budget(cached_tokens=needed - 1)).add(jobs[0], 0.0)


@pytest.mark.parametrize("short_at", [2, 5, 6])
def test_a_part_that_runs_out_of_memory_runs_again_with_the_same_cache(pair64: Any, short_at: int) -> None:
    jobs = [make_job(pair64, str(seed), seed=seed, prompt="Hi" * (seed + 1)) for seed in range(3)]
    expected = {name: [each.token_ids for each in result.trajectories] for name, result in run(pair64, jobs).items()}
    model = Watched(pair64.loaded.model, lambda what, sizes: what == "head" and len(sizes) == short_at)
    runner = watched(pair64, model)
    assert answers(runner, jobs) == (expected, {})
    assert runner.stats.out_of_memory == 1


def test_the_answer_ends_with_the_block_in_which_its_text_ends(pair64: Any) -> None:
    jobs = [make_job(pair64, str(seed), seed=seed, max_tokens=18, ignore_eos=True) for seed in range(6)]
    whole = run(pair64, jobs)
    stops = {result.trajectories[0].token_ids[index] for index, result in enumerate(whole.values(), start=5)}
    info = replace(pair64.loaded.info, stop_token_ids=tuple(stops))
    ends = [replace(job, sampling=replace(job.sampling, ignore_eos=False)) for job in jobs]
    ended = run(replace(pair64, loaded=replace(pair64.loaded, info=info)), ends)
    for job in jobs:
        (trajectory,), tokens = ended[job.id].trajectories, whole[job.id].trajectories[0].token_ids
        first = next(index for index, token in enumerate(tokens) if token in stops)
        length = min(18, (first + job.lead) // 4 * 4 + 4 - job.lead)
        assert trajectory.token_ids == tokens[:length]
        assert (trajectory.finish_reason, trajectory.completion_tokens) == ("stop", first)
        assert (ended[job.id].model_calls < whole[job.id].model_calls) == (length < 18)
    assert min(len(result.trajectories[0].token_ids) for result in ended.values()) < 18


def test_what_is_past_the_answer_is_not_seen(pair64: Any) -> None:
    values = {"method": "entrgi", "gradient_steps": 1, "ignore_eos": True}
    job = make_job(pair64, "seen", max_tokens=9, steps=20, **values)
    runner = Runner(pair64.loaded, pair64.rewards)
    runner.add(replace(job, stream_tokens=True, stream_canvas=True, trace=True), 0.0)
    revealed: list[tuple[int, int]] = []
    while runner.has_work:
        for event in runner.step():
            if isinstance(event, Progress):
                revealed += event.revealed
            elif isinstance(event, Canvas):
                assert len(event.token_ids) == len(event.entropy or ()) == 9
            elif isinstance(event, Finished):
                (trajectory,) = event.result.trajectories
    assert tuple(token for _, token in sorted(revealed)) == trajectory.token_ids
    assert len(trajectory.token_ids) == 9
    assert max(step.masked for step in trajectory.trace) == 9


def test_a_deadline_ends_with_the_finished_blocks_and_what_is_known_of_the_last(pair64: Any) -> None:
    job = make_job(pair64, "late", max_tokens=20, ignore_eos=True)
    (whole,) = run(pair64, [job])[job.id].trajectories
    now = 0.0
    runner = Runner(pair64.loaded, {}, clock=lambda: now)
    runner.add(replace(job, deadline=1.0), 0.0)
    for _ in range(9):
        runner.step()
    now = 2.0
    (finished,) = (event for event in runner.step() if isinstance(event, Finished))
    (trajectory,) = finished.result.trajectories
    known = next(i for i, token in enumerate(trajectory.token_ids) if token == pair64.loaded.info.mask_token_id)
    assert 4 <= known < 20 == len(trajectory.token_ids)
    assert trajectory.token_ids[:known] == whole.token_ids[:known]
    assert (trajectory.stop_reason, trajectory.completion_tokens) == ("deadline", known)

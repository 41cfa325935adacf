"""The plan of a run, against hand counts, the golden traces and invariants."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.answers import approximations
from server.diffusion.schedule import Step, adapted, block_lengths, blocks, plan, time_grid
from server.types import DiffusionParams, GuidanceParams
from tests.support.models import GOLDEN

RUNS = {
    "max_tokens": st.integers(1, 200),
    "steps": st.integers(1, 200),
    "block_length": st.none() | st.integers(1, 200),
    "schedule": st.sampled_from(["linear", "even"]),
}


def planned(max_tokens: int, guidance: GuidanceParams | None = None, **diffusion: Any) -> tuple[Step, ...]:
    return plan(max_tokens, DiffusionParams(**diffusion), guidance or GuidanceParams())


def reveals(max_tokens: int, **diffusion: Any) -> list[int]:
    return [step.reveal for step in planned(max_tokens, **diffusion)]


def test_recorded_runs_reveal_as_many_tokens_a_step() -> None:
    cases = json.loads((GOLDEN / "dream-tiny" / "trajectories.json").read_text())
    checked = 0
    for case in cases:
        for first_canvases in zip(*case["expected"]["canvas_trace"], strict=True):
            masked = [sum(token == 3 for token in canvas) for canvas in first_canvases] + [0]
            recorded = [before - after for before, after in itertools.pairwise(masked)]
            assert reveals(case["max_tokens"], steps=case["steps"], algorithm=case["alg"]) == recorded
            checked += 1
    assert checked > 60


def test_twice_as_many_steps_as_tokens_leave_half_of_them_empty() -> None:
    counts = reveals(64, steps=128)
    assert sum(counts) == 64
    assert counts.count(0) == 65  # counted in algorithm.md


def test_even_schedule_spreads_the_remainder_over_the_first_steps() -> None:
    assert reveals(10, steps=4, schedule="even") == [3, 3, 2, 2]
    assert reveals(3, steps=5, schedule="even") == [1, 1, 1, 0, 0]


def test_blocks_share_the_steps() -> None:
    assert blocks(10, 7, 4) == [(0, 4, 3), (4, 8, 2), (8, 10, 2)]
    assert blocks(9, 2, 3) == [(0, 3, 1), (3, 6, 1), (6, 9, 1)]
    assert blocks(9, 5, None) == [(0, 9, 5)]


def test_blocks_that_begin_in_the_prompt_and_are_filled_whole() -> None:
    assert blocks(10, 7, 4, 3, whole=True) == [(0, 1, 2), (1, 5, 2), (5, 9, 2), (9, 13, 1)]
    assert blocks(10, 7, 4, 3) == [(0, 1, 2), (1, 5, 2), (5, 9, 2), (9, 10, 1)]
    assert blocks(1, 4, 4, 3, whole=True) == [(0, 1, 4)]
    assert block_lengths(11, 6, 4) == (2, 4, 4, 1)  # a prompt of six, counted back from its end
    assert block_lengths(11, 4, 4) == (4, 4, 3)
    assert block_lengths(7, -4, 4) == (4, 3)
    assert block_lengths(2, 8, 4) == (2,)


@pytest.mark.parametrize("algorithm", ["maskgit_plus", "threshold"])
def test_a_block_filled_whole_reveals_as_a_block_of_full_length(algorithm: Any) -> None:
    """`even` counts on the block length, though fewer may be masked; an adaptive algorithm reveals at least as many."""
    diffusion = DiffusionParams(6, algorithm, block_length=8, schedule="even", blocks_from="start")
    steps = plan(7, diffusion, GuidanceParams(), lead=3)
    assert [(step.start, step.stop) for step in steps] == [(0, 5)] * 3 + [(5, 13)] * 3
    if algorithm == "threshold":
        assert [step.least(left) for step, left in zip(steps, [5, 2, 1, 8, 5, 2], strict=True)] == [3, 2, 1, 3, 3, 2]
        assert steps[3].least(4) == 3
    else:
        assert [step.reveal for step in steps] == [3, 2, 0, 3, 3, 2]


def test_time_runs_from_one_to_eps_evenly() -> None:
    grid = time_grid(7)
    assert grid[0] == 1.0
    assert grid[-1] == 1e-3
    gaps = [a - b for a, b in itertools.pairwise(grid)]
    assert gaps == pytest.approx([0.999 / 7] * 7)


def test_the_guided_window_counts_scheduled_steps() -> None:
    guidance = GuidanceParams(method="entrgi", start=0.25, stop=0.75, every=2, gradient_steps=5)
    assert [step.gradient_steps for step in planned(8, guidance, steps=8)] == [0, 0, 5, 0, 5, 0, 0, 0]
    for without in (replace(guidance, gradient_steps=0), replace(guidance, method="bon")):
        assert not any(step.guided for step in planned(8, without, steps=8))


@given(**RUNS)
def test_every_plan_reveals_every_position_of_every_block_once(max_tokens: int, **run: Any) -> None:
    steps = planned(max_tokens, **run)
    revealed: dict[tuple[int, int], int] = {}
    for step in steps:
        assert step.reveal >= 0
        revealed[step.start, step.stop] = revealed.get((step.start, step.stop), 0) + step.reveal
    assert all(count == stop - start for (start, stop), count in revealed.items())
    assert sum(revealed.values()) == max_tokens
    assert [step.index for step in steps] == list(range(len(steps)))
    assert len(steps) >= run["steps"] or run["block_length"] is not None


@given(**RUNS, algorithm=st.sampled_from(["entropy_bound", "threshold"]))
def test_an_adaptive_run_keeps_the_pace_of_the_exact_one(max_tokens: int, algorithm: str, **run: Any) -> None:
    """When the rule allows nothing, each step reveals what the schedule does, and one where that is none: the run never
    lags behind, and ends within T steps."""
    exact, adaptive = planned(max_tokens, **run), planned(max_tokens, **run, algorithm=algorithm)
    assert [(step.start, step.stop, step.time) for step in adaptive] == [(s.start, s.stop, s.time) for s in exact]
    left = {(step.start, step.stop): step.stop - step.start for step in exact}
    behind = dict(left)
    for step, counted in zip(adaptive, exact, strict=True):
        block = step.start, step.stop
        left[block] -= counted.reveal
        assert step.left == counted.left == left[block]
        if behind[block]:
            behind[block] -= min(behind[block], step.least(behind[block]))
            assert step.reveal == 1
        assert behind[block] <= left[block]
    assert not any(behind.values())


@given(max_tokens=st.integers(1, 200), more=st.integers(0, 100), schedule=RUNS["schedule"])
def test_with_a_step_a_token_the_pace_never_asks_for_more_than_one(max_tokens: int, more: int, schedule: str) -> None:
    steps = planned(max_tokens, steps=max_tokens + more, algorithm="threshold", schedule=schedule)
    assert all(step.least(max_tokens - taken) == 1 for taken, step in enumerate(steps[:max_tokens]))


def test_the_window_of_an_adaptive_run_counts_what_is_revealed_and_the_steps_taken() -> None:
    guidance = GuidanceParams(method="entrgi", start=0.25, stop=0.75, every=2)
    step = plan(8, DiffusionParams(8, "threshold"), guidance)[5]
    for masked, taken, guided in ((6, 0, True), (6, 1, False), (7, 0, False), (3, 4, True), (2, 4, False)):
        assert adapted(step, masked, 8, taken, guidance).guided == guided


def named(steps: int, algorithm: Any = "entropy", **guidance: Any) -> list[str]:
    return list(approximations(8, DiffusionParams(steps, algorithm), GuidanceParams("entrgi", **guidance)))


def test_a_window_is_an_approximation_where_it_leaves_a_step_that_reveals_something_unguided() -> None:
    assert named(8) == []
    assert named(8, every=2) == ["guidance.every"]
    assert named(1, every=2) == []  # the only step is guided
    assert named(8, stop=0.99) == []  # the last step begins at 7/8
    assert named(8, stop=0.8, start=0.3) == ["guidance.start", "guidance.stop"]
    assert named(8, start=0.1) == []  # the first step, at 0, reveals nothing
    assert named(8, "origin", start=0.1) == ["guidance.start"]  # and here it may
    assert named(8, every=2, gradient_steps=0) == []
    assert named(8, "threshold") == ["threshold"]
    assert named(8, "entropy_bound", stop=0.99) == ["entropy_bound", "guidance.stop"]
    assert approximations(8, DiffusionParams(8, "entropy_bound"), GuidanceParams()) == ("entropy_bound",)

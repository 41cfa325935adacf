"""Parts of a step: the same tokens in any number of them, and what happens when memory runs out in one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.budget import Budget
from server.types import Job, Message, SamplingParams
from server.worker.failures import RECOVERY_PARTS, Attempt, Limits
from server.worker.runner import Runner
from tests.support.jobs import answers, make_job
from tests.support.models import Around, Watched, allocate, diffusion, reward, tokenizer


def jobs() -> list[Job]:
    """Guided, unguided, of different M, with classifier-free guidance, with shared and different prompts."""
    guided: dict[str, Any] = {"method": "entrgi", "gradient_steps": 2}
    kinds: list[dict[str, Any]] = [
        {"best_of": 2, "n": 2},
        {**guided, "best_of": 3},
        {**guided, "method": "aps", "gradient_steps": 3, "best_of": 2, "algorithm": "maskgit_plus"},
        {**guided, "cfg_scale": 0.7},
        {**guided, "confidence": "guided", "temperature": 0.0, "block_length": 4},
        {"cfg_scale": 1.5, "algorithm": "topk_margin"},
    ]
    return [
        make_job(f"job-{index}", "Hi" if index % 2 else "Tell me more", tokenizer("llada"), seed=index, **kind)
        for index, kind in enumerate(kinds)
    ]


LOADED, REWARDS = diffusion("llada"), {"rm": reward("llada")}


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    finished, failed = answers(Runner(LOADED, REWARDS), jobs())
    assert not failed
    return finished


def watched(model: Any, **options: Any) -> Runner:
    return Runner(replace(LOADED, model=model), REWARDS, **options)


@pytest.mark.parametrize(
    "budget",
    [
        Budget(guided_rows=16, logit_rows=16),
        Budget(guided_rows=24, logit_rows=8),
        Budget(reward_tokens=60),
        Budget(tokens=100, guided_rows=32),
        Budget(trajectories=1),
    ],
    ids=str,
)
def test_any_budget_gives_the_same_tokens_and_holds(expected: dict[str, Any], budget: Budget) -> None:
    model = Watched(LOADED.model)
    runner = watched(model, budget=budget, largest=Budget())
    assert answers(runner, jobs()) == (expected, {})
    assert max(model.sizes["head"]) <= max(budget.guided_rows, budget.logit_rows, 16)
    assert max(model.sizes["forward"]) <= max(budget.tokens, 0)
    assert runner.stats.out_of_memory == 0


def test_memory_that_runs_out_once_costs_a_second_try_and_no_token(expected: dict[str, Any]) -> None:
    for what in ("forward", "head"):
        third = Watched(LOADED.model, lambda seen, sizes, what=what: seen == what and len(sizes) == 3)  # type: ignore[misc]
        runner = watched(third)
        assert answers(runner, jobs()) == (expected, {}), what
        assert runner.stats.out_of_memory == 1


def test_parts_shrink_until_they_fit_and_stay_small(expected: dict[str, Any]) -> None:
    runner = watched(Watched(LOADED.model, lambda what, sizes: what == "head" and sizes[-1] > 24))
    finished, failed = answers(runner, jobs())
    # The first step may give up what did not fit in halves either; from then on everything fits.
    assert finished == {name: tokens for name, tokens in expected.items() if name not in failed}
    assert all(event.kind == "out_of_memory" for event in failed.values())
    assert runner.stats.out_of_memory <= 6
    assert runner.denoiser.guided.now[0] <= 24
    again, failed = answers(runner, jobs())
    assert (again, failed) == (expected, {})


def test_only_the_jobs_that_memory_cannot_hold_fail(expected: dict[str, Any]) -> None:
    """A lone trajectory too large for memory is tried twice; its neighbours do not notice."""
    big = replace(jobs()[1], id="big", sampling=SamplingParams(max_tokens=40, seed=9))
    model = Watched(LOADED.model, lambda what, sizes: what == "head" and sizes[-1] >= 30)
    runner = watched(model, budget=Budget(guided_rows=24, logit_rows=24), largest=Budget())
    finished, failed = answers(runner, [*jobs(), big])
    assert finished == expected
    assert {name: (event.kind, event.message) for name, event in failed.items()} == {
        "big": ("out_of_memory", "the device ran out of memory")
    }
    assert runner.stats.out_of_memory == 2


class Scarce(Around):
    """A reward model that runs out of memory for conversations of more tokens, or more final scores at once."""

    def __init__(self, most_ids: float = math.inf, most_scores: float = math.inf) -> None:
        super().__init__(REWARDS["rm"])
        self.most_ids, self.most_scores = most_ids, most_scores

    def prefill_all(self, sequences: Sequence[Sequence[int]]) -> Any:
        return allocate() if sum(map(len, sequences)) > self.most_ids else self.model.prefill_all(sequences)

    def score(self, sequences: Sequence[Sequence[int]]) -> Any:
        return allocate() if len(sequences) > self.most_scores else self.model.score(sequences)


def test_final_rewards_are_read_one_by_one_when_memory_is_short(expected: dict[str, Any]) -> None:
    scarce: Any = Scarce(most_scores=1)
    runner = Runner(LOADED, {"rm": scarce})
    assert answers(runner, jobs()[:3]) == ({f"job-{index}": expected[f"job-{index}"] for index in range(3)}, {})
    assert runner.stats.out_of_memory == 2  # of the two jobs with several guided answers


def test_a_conversation_that_memory_cannot_hold_fails_alone(expected: dict[str, Any]) -> None:
    scarce: Any = Scarce(most_ids=2 * len(LOADED.tokenizer.render_chat(jobs()[1].conversation)))
    big = replace(jobs()[1], id="big", conversation=(Message("user", "Hello " * 40),))
    finished, failed = answers(Runner(LOADED, {"rm": scarce}), [big, *jobs()[:3]])
    assert finished == {f"job-{index}": expected[f"job-{index}"] for index in range(3)}
    assert {name: event.kind for name, event in failed.items()} == {"big": "out_of_memory"}


# -- the parts by themselves -----------------------------------------------------------------------------------------


def work_through(
    limits: Limits, items: Sequence[int], sizes: Sequence[tuple[int, ...]], work: Callable[[Sequence[int]], None]
) -> tuple[list[list[int]], list[int]]:
    """The parts that went well, and the items that were given up."""
    done, lost = [], []
    for part in limits.parts(items, sizes):
        with part:
            work(part.items)
        if not part.ran_out:
            done.append(list(part.items))
        if part.lost:
            lost += part.items
    return done, lost


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=30),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.integers(1, 60),
)
def test_parts_keep_the_order_and_the_limits_whatever_memory_there_is(
    sizes: list[tuple[int, int]], most: tuple[int, int], memory: int
) -> None:
    shortages: list[None] = []
    limits = Limits("parts", most, lambda: shortages.append(None))
    tries: list[list[int]] = []

    def work(part: Sequence[int]) -> None:
        tries.append(list(part))
        total = [sum(column) for column in zip(*(sizes[item] for item in part), strict=True)]
        assert len(part) == 1 or all(a <= b for a, b in zip(total, most, strict=True))
        if sum(total) > memory:
            raise MemoryError

    done, lost = work_through(limits, range(len(sizes)), sizes, work)
    kept = [item for part in done for item in part]
    assert sorted(kept + lost) == list(range(len(sizes)))
    assert kept == sorted(kept)
    assert all(limit >= 1 for limit in limits.now)
    assert len(tries) == len(done) + len(shortages)
    for item in lost:
        assert sum(item in part for part in tries) == 2
    if all(sum(size) <= memory for size in sizes) and sum(most) <= memory:
        assert not shortages


def test_shrunken_limits_recover_slowly() -> None:
    limits = Limits("parts", (64,), lambda: None)
    memory = 40

    def work(part: Sequence[int]) -> None:
        if len(part) > memory:
            raise MemoryError

    def sizes_of_parts(count: int) -> list[int]:
        done, lost = work_through(limits, range(count), [(1,)] * count, work)
        assert not lost
        return [len(part) for part in done]

    assert sizes_of_parts(64) == [32, 32]
    for _ in range(RECOVERY_PARTS - 3):
        sizes_of_parts(1)
    assert limits.now == (32,)
    sizes_of_parts(1)
    assert limits.now == (64,)
    memory = 64
    assert sizes_of_parts(64) == [64]


class Held:
    """Something that notes when it is let go, even from a cycle."""

    def __init__(self, gone: list[str]) -> None:
        self.gone, self.itself = gone, self

    def __del__(self) -> None:
        self.gone.append("gone")


def test_a_failed_try_lets_go_of_what_it_held_before_the_next_one() -> None:
    gone: list[str] = []

    def hold() -> None:
        held = Held(gone)
        assert held.itself is held
        allocate()

    with Attempt() as attempt:
        hold()
    assert attempt.ran_out
    assert gone == ["gone"]

"""Two lanes: the same tokens as one, really at the same time, and what happens when one of them fails.

On the CPU, where the scheme is threads without streams; `test_devices.py` has the tests that need a GPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.checkpoints import Shape
from benchmarks.overlap_steps import Setup, measure_overlap
from server.budget import Budget
from server.errors import ConfigurationError
from server.models.loading import LoadedDiffusionModel, load_diffusion_model
from server.rewards.reward_model import RewardModel, load_reward_model
from server.types import DiffusionParams, GuidanceParams, Job, Message, SamplingParams, WeightedReward
from server.wire.config import WorkerConfig
from server.wire.messages import Finished
from server.worker.overlap import Lanes
from server.worker.runner import Runner
from server.worker.savings import Savings
from server.worker.service import load
from tests.support.jobs import answers

GOLDEN = Path(__file__).parents[1] / "golden" / "llada-tiny"
CPU = torch.device("cpu")
SECONDS = 60.0  # in which lanes must meet; far more than they need


@pytest.fixture(scope="module")
def loaded() -> LoadedDiffusionModel:
    return load_diffusion_model(str(GOLDEN / "dlm"), dtype=torch.float64)


@pytest.fixture(scope="module")
def rewards(loaded: LoadedDiffusionModel) -> dict[str, RewardModel]:
    model = load_reward_model(
        "rm",
        str(GOLDEN / "rm"),
        diffusion_tokenizer=loaded.tokenizer,
        diffusion_vocab_size=loaded.model.vocab_size,
        dtype=torch.float64,
        device=CPU,
    )
    return {"rm": model}


def lanes() -> Lanes:
    """Lanes that take anything that can be halved."""
    return Lanes(CPU, least_tokens=1, least_trajectories=1)


def make_jobs(loaded: LoadedDiffusionModel) -> list[Job]:
    """Guided and not, of different M, on two prompts, long enough for prefixes that grow twice."""
    guided = GuidanceParams("entrgi", (WeightedReward("rm"),), gradient_steps=2)
    kinds: list[tuple[GuidanceParams, dict[str, Any], dict[str, Any]]] = [
        (guided, {"best_of": 3, "max_tokens": 24}, {"block_length": 8, "steps": 12}),
        (GuidanceParams(), {"best_of": 2, "n": 2}, {}),
        (replace(guided, method="aps", gradient_steps=3), {"best_of": 2}, {"algorithm": "maskgit_plus"}),
        (guided, {"best_of": 2}, {"cfg_scale": 0.7}),
        (replace(guided, confidence="guided", gradient_steps=1), {"temperature": 0.0}, {"block_length": 4}),
    ]
    jobs = []
    for index, (guidance, sampling, diffusion) in enumerate(kinds):
        conversation = (Message("user", "Hi" if index % 2 else "Tell me more"),)
        jobs.append(
            Job(
                id=f"job-{index}",
                prompt_ids=tuple(loaded.tokenizer.render_chat(conversation)),
                sampling=SamplingParams(**{"max_tokens": 8, "seed": index} | sampling),
                diffusion=DiffusionParams(**{"steps": 8} | diffusion),
                guidance=guidance,
                conversation=conversation,
            )
        )
    return jobs


@pytest.fixture(scope="module")
def expected(loaded: LoadedDiffusionModel, rewards: dict[str, RewardModel]) -> dict[str, Any]:
    finished, failed = answers(Runner(loaded, rewards), make_jobs(loaded))
    assert not failed
    return finished


class Watched:
    """A model that tells a hook, before and after, which of its methods runs, in which thread, on how many rows."""

    def __init__(self, model: Any, method: str, hook: Any) -> None:
        self.model, self.method, self.hook = model, method, hook

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.model, name)
        if name != self.method:
            return value

        def told(*arguments: Any) -> Any:
            self.hook("before", arguments)
            try:
                return value(*arguments)
            finally:
                self.hook("after", arguments)

        return told


# -- the same tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"savings": Savings.without(["share_equal_canvases"])},
        {"savings": Savings.without(["head_on_masked_rows", "reward_prefix_cache"])},
        {"budget": Budget(guided_rows=48, logit_rows=48, reward_tokens=200, tokens=160), "largest": Budget()},
    ],
    ids=["plain", "canvases twice", "no cache", "small budgets"],
)
def test_halves_give_the_tokens_of_the_whole(
    loaded: LoadedDiffusionModel, rewards: dict[str, RewardModel], expected: dict[str, Any], options: dict[str, Any]
) -> None:
    threads: set[int] = set()
    model: Any = Watched(loaded.model, "head", lambda when, arguments: threads.add(threading.get_ident()))
    model = Watched(model, "masked_logits", lambda when, arguments: threads.add(threading.get_ident()))
    runner = Runner(replace(loaded, model=model), rewards, lanes=lanes(), **options)
    assert answers(runner, make_jobs(loaded)) == (expected, {})
    assert len(threads) == 2
    assert runner.stats.out_of_memory == 0


def test_each_lane_keeps_to_its_half_of_the_budgets(
    loaded: LoadedDiffusionModel, rewards: dict[str, RewardModel], expected: dict[str, Any]
) -> None:
    lane_of: dict[int, list[int]] = {}

    def note(when: str, arguments: Any) -> None:
        if when == "before":
            lane_of.setdefault(threading.get_ident(), []).append(len(arguments[0]))

    model: Any = Watched(loaded.model, "head", note)
    budget = Budget(guided_rows=64, logit_rows=64)
    runner = Runner(replace(loaded, model=model), rewards, budget=budget, largest=Budget(), lanes=lanes())
    assert answers(runner, make_jobs(loaded)) == (expected, {})
    helper = [sizes for thread, sizes in lane_of.items() if thread != threading.get_ident()]
    assert len(helper) == 1
    assert max(helper[0]) <= 32


def test_a_trajectory_too_large_for_half_of_a_budget_is_not_overlapped(
    loaded: LoadedDiffusionModel, rewards: dict[str, RewardModel]
) -> None:
    threads: set[int] = set()
    model: Any = Watched(loaded.model, "head", lambda when, arguments: threads.add(threading.get_ident()))
    jobs = [replace(job, id=f"{job.id}-{i}") for i in range(2) for job in make_jobs(loaded)[2:3]]
    for rows, overlapped in ((15, False), (16, True)):
        threads.clear()
        runner = Runner(
            replace(loaded, model=model), rewards, budget=Budget(guided_rows=rows), largest=Budget(), lanes=lanes()
        )
        for job in jobs:
            runner.add(job, now=0.0)
        runner.step()
        assert (len(threads) == 2) is overlapped


def test_unguided_steps_and_small_ones_run_in_one_piece(
    loaded: LoadedDiffusionModel, rewards: dict[str, RewardModel]
) -> None:
    threads: set[int] = set()
    model: Any = Watched(loaded.model, "head", lambda when, arguments: threads.add(threading.get_ident()))
    unguided, guided = make_jobs(loaded)[1], make_jobs(loaded)[2]
    for jobs, made in (([unguided], lanes()), ([guided], Lanes(CPU)), ([guided], Lanes(CPU, least_tokens=1))):
        runner = Runner(replace(loaded, model=model), rewards, lanes=made)
        finished, failed = answers(runner, jobs)
        assert list(finished) == [jobs[0].id]
        assert not failed
        assert threads == {threading.get_ident()}


# -- at the same time -----------------------------------------------------------------------------------------------


def test_the_diffusion_model_of_one_half_runs_while_the_reward_model_reads_the_other(
    loaded: LoadedDiffusionModel, rewards: dict[str, RewardModel]
) -> None:
    """The first lane is held inside its first reward pass until the second is inside the trunk, and the second there
    until the first is in that pass. One after the other they could not meet."""
    in_trunk, in_reward = threading.Event(), threading.Event()
    entered: list[int] = []
    inside: list[int] = []
    most: list[int] = []

    def trunk(when: str, arguments: Any) -> None:
        if when == "after":
            inside.pop()
            return
        inside.append(threading.get_ident())
        most.append(len(inside))
        entered.append(threading.get_ident())
        if len(entered) == 2:  # the other lane's first
            in_trunk.set()
            assert in_reward.wait(SECONDS)

    def reward(when: str, arguments: Any) -> None:
        if when == "before" and not in_reward.is_set():
            in_reward.set()
            assert in_trunk.wait(SECONDS)

    model: Any = Watched(loaded.model, "masked_hidden", trunk)
    watched: Any = Watched(rewards["rm"], "read", reward)
    runner = Runner(replace(loaded, model=model), {"rm": watched}, lanes=lanes())
    guided = make_jobs(loaded)[2]
    runner.add(guided, now=0.0)
    runner.step()
    assert len(set(entered)) == 2
    assert max(most) == 1


# -- when one fails -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["first", "second", "both"])
def test_a_failure_comes_out_after_the_other_lane_is_done(which: str, caplog: pytest.LogCaptureFixture) -> None:
    done = threading.Event()
    here = lanes()

    def fails() -> str:
        raise RuntimeError("something broke")

    def works() -> str:
        done.wait(0.2)  # long enough for the failure to come first
        done.set()
        return "well"

    works_of = {"first": (fails, works), "second": (works, fails), "both": (fails, fails)}[which]
    with pytest.raises(RuntimeError, match="something broke"):
        here.run(works_of)
    assert done.is_set() is (which != "both")
    assert ("the other lane failed too" in caplog.text) is (which == "both")
    assert here.run((lambda: 1, lambda: 2)) == [1, 2]
    assert here.run((lambda: 3,)) == [3]


def test_a_step_that_fails_in_one_lane_changes_no_trajectory(
    loaded: LoadedDiffusionModel, rewards: dict[str, RewardModel], expected: dict[str, Any]
) -> None:
    fail = threading.Event()
    main = threading.get_ident()

    def head(when: str, arguments: Any) -> None:
        if when == "before" and threading.get_ident() != main and fail.is_set():
            raise RuntimeError("the second lane broke")

    model: Any = Watched(loaded.model, "head", head)
    runner = Runner(replace(loaded, model=model), rewards, lanes=lanes())
    for job in make_jobs(loaded):
        runner.add(job, now=0.0)
    runner.step()
    fail.set()
    with pytest.raises(RuntimeError, match="the second lane broke"):
        runner.step()
    fail.clear()
    finished: dict[str, Any] = {}
    while runner.has_work:
        for event in runner.step():
            assert isinstance(event, Finished)
            finished[event.job_id] = [trajectory.token_ids for trajectory in event.result.trajectories]
    assert finished == expected


@pytest.mark.parametrize("lane", ["first", "second"])
def test_memory_that_runs_out_in_one_lane_shrinks_that_lane_alone(
    loaded: LoadedDiffusionModel, rewards: dict[str, RewardModel], expected: dict[str, Any], lane: str
) -> None:
    main = threading.get_ident()
    left: Iterator[bool] = iter([False, True])

    def head(when: str, arguments: Any) -> None:
        here = "first" if threading.get_ident() == main else "second"
        if when == "before" and here == lane and next(left, False):
            torch.empty(2**60, dtype=torch.uint8)

    model: Any = Watched(loaded.model, "head", head)
    runner = Runner(replace(loaded, model=model), rewards, lanes=lanes())
    assert answers(runner, make_jobs(loaded)) == (expected, {})
    assert runner.stats.out_of_memory == 1
    first, second = runner.denoiser.lane_limits
    shrunken, whole = (first, second) if lane == "first" else (second, first)
    assert shrunken.guided.now < shrunken.guided.most or shrunken.unguided.now < shrunken.unguided.most
    assert (whole.guided.now, whole.unguided.now) == (whole.guided.most, whole.unguided.most)
    assert (runner.denoiser.limits.guided.now, runner.denoiser.limits.unguided.now) == (
        runner.denoiser.limits.guided.most,
        runner.denoiser.limits.unguided.most,
    )


# -- what it is worth -----------------------------------------------------------------------------------------------


def test_the_measurement_runs_both_ways() -> None:
    """On tiny models; its figures mean something on a GPU only."""
    tiny = Setup(Shape(512, 32, 2, 2, 64), Shape(512, 32, 2, 2, 64), "float32", 3, 2, 8, 4, 1)
    figures = measure_overlap(CPU, tiny, lambda device: Lanes(device, least_tokens=1))
    assert figures["milliseconds_with"] > 0
    assert figures["milliseconds_without"] > 0
    assert figures["trajectories"] == 6


# -- the parts by themselves ----------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=1, max_size=12), st.integers(1, 3))
def test_the_cut_leaves_the_halves_most_alike(sizes: list[tuple[int, int]], least: int) -> None:
    tokens = [size for size, _ in sizes]
    costs = [size + extra for size, extra in sizes]
    cut = Lanes(CPU, least_tokens=20, least_trajectories=least).split(tokens, costs)

    def unlike(at: int) -> int:
        return abs(sum(costs[:at]) - sum(costs[at:]))

    possible = range(least, len(sizes) - least + 1)
    best = min((unlike(at) for at in possible), default=None)
    if cut is None:
        assert best is None or any(
            unlike(at) == best and min(sum(tokens[:at]), sum(tokens[at:])) < 20 for at in possible
        )
    else:
        assert cut in possible
        assert unlike(cut) == best
        assert min(sum(tokens[:cut]), sum(tokens[cut:])) >= 20


@pytest.mark.parametrize(
    ("changes", "reason"), [({}, "there are no streams on cpu"), ({"reward_models": {}}, "there is no reward model")]
)
def test_overlap_is_refused_where_it_cannot_work(changes: dict[str, Any], reason: str) -> None:
    config = WorkerConfig(str(GOLDEN / "dlm"), device="cpu", reward_models={"rm": str(GOLDEN / "rm")}, overlap=True)
    with pytest.raises(ConfigurationError, match=f"overlap: {reason}"):
        load(replace(config, **changes))

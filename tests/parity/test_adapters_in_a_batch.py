"""Base and adapters in one batch: each answer is that of the plain loop on the weights with its adapter merged in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from server.errors import AdapterGone
from server.guidance.plain import PlainLoop
from server.models.loading import load_diffusion_model
from server.models.lora import load_adapter
from server.types import Job, Resampling, WeightedReward
from server.worker.runner import Runner
from tests.support.jobs import finish, make_job
from tests.support.lora import write_adapter, write_merged
from tests.support.models import BLOCK_CAUSAL, FAMILIES, GOLDEN

CASES: list[dict[str, Any]] = [
    {},
    {"method": "bon", "best_of": 2},
    {"method": "bon", "best_of": 3, "temperature": 1.0, "resample": Resampling(every=2, strength=3.0, threshold=0.9)},
    {"method": "entrgi", "gradient_steps": 2, "best_of": 2},
    {"method": "aps", "gradient_steps": 1, "cfg_scale": 0.5, "temperature": 0.0},
    {"method": "expectation", "gradient_steps": 2, "block_length": 3, "algorithm": "maskgit_plus"},
]
"""One prompt and seed, so that requests differ in nothing but their models."""


def jobs_for(pair: Any, adapter: str | None) -> list[Job]:
    jobs = []
    for index, case in enumerate(CASES):
        values = pair.blocks | case | ({"cfg_scale": 0.0} if pair.blocks else {})
        jobs.append(make_job(f"{adapter}-{index}", "Hi", pair.loaded.tokenizer, seed=5, adapter=adapter, **values))
    return jobs


@pytest.mark.parametrize("family", [*FAMILIES, *BLOCK_CAUSAL], scope="session")
def test_tokens_equal_the_plain_loop_on_merged_weights_in_float64(pair64: Any, family: str, tmp_path: Path) -> None:
    base, runner = GOLDEN / f"{family}-tiny" / "dlm", Runner(pair64.loaded, pair64.rewards)
    loops = {None: pair64.plain}
    for version, rank in (("first", 2), ("second", 4)):
        folder = write_adapter(tmp_path / version, base, rank=rank, seed=rank)
        runner.adapters[version] = load_adapter(pair64.loaded.model, folder, 4)
        merged = load_diffusion_model(write_merged(folder / "merged", base, folder), dtype=torch.float64)
        loops[version] = PlainLoop(merged.model, merged.tokenizer, merged.info, pair64.plain.rewards)
    jobs = [job for each in zip(*(jobs_for(pair64, version) for version in loops), strict=True) for job in each]
    finished, failed = finish(runner, jobs)
    assert not failed
    answers = []
    for job in jobs:
        expected = loops[job.adapter].run(job)
        answers.append([list(trajectory.token_ids) for trajectory in finished[job.id].trajectories])
        assert answers[-1] == expected.token_ids, job.id
    assert all(answers[at] != answers[at + 1] != answers[at + 2] for at in range(0, len(answers), len(loops)))


def test_a_job_keeps_the_adapter_that_it_came_with_and_later_ones_do_not_find_it(pair64: Any, tmp_path: Path) -> None:
    family = pair64.loaded.info.family
    folder = write_adapter(tmp_path, GOLDEN / f"{family}-tiny" / "dlm")
    runner = Runner(pair64.loaded, pair64.rewards)
    runner.adapters["policy@1"] = load_adapter(pair64.loaded.model, folder, 4)
    job = make_job("job", adapter="policy@1", reward_models=(WeightedReward("rm"),))
    finished, _ = finish(runner, [job])
    runner.add(job, 0.0)
    runner.adapters.clear()
    with pytest.raises(AdapterGone, match="send it again"):
        runner.add(make_job("late", adapter="policy@1"), 0.0)
    assert finish(runner, [])[0]["job"].trajectories == finished["job"].trajectories

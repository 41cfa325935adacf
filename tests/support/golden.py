"""The authors' recorded runs (tests/golden/README.md), all cases of a family in one crowd."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.types import Job
from tests.support.jobs import make_job, run
from tests.support.models import GOLDEN, Pair

FILES = ("trajectories.json", "blocks.json")  # a family has one or both
SAME_NAMES = ("steps", "deprioritize_eos", "gradient_steps", "eta", "max_tokens", "temperature", "top_p", "top_k")
OPTIONAL = ("block_length", "schedule", "cfg_scale")


def golden_jobs(pair: Pair, family: str) -> Iterator[tuple[Job, list[int], float]]:
    """(job, recorded tokens, recorded final reward) for every prompt of every case."""
    for path in filter(Path.is_file, (GOLDEN / f"{family}-tiny" / file for file in FILES)):
        for case in json.loads(path.read_text()):
            values = {key: case[key] for key in (*SAME_NAMES, *OPTIONAL) if key in case}
            values |= {"algorithm": case["alg"], "method": case["guidance"], "reward_models": ("rm",)}
            for index, prompt in enumerate(case["prompts"]):
                name = f"{path.stem}/{case['id']}[{index}]"
                job = make_job(name, prompt, pair.loaded.tokenizer, ignore_eos=True, **values)
                yield job, case["expected"]["token_ids"][index], case["expected"]["rewards"][index][0]


def replay(pair: Pair, family: str) -> tuple[list[str], int]:
    """Mismatches, and how many runs there were."""
    recorded = list(golden_jobs(pair, family))
    results = run(pair, [job for job, _, _ in recorded])
    wrong = []
    for job, tokens, reward in recorded:
        (trajectory,) = results[job.id].trajectories
        if list(trajectory.token_ids) != tokens:
            wrong.append(f"{job.id}: {trajectory.token_ids} want {tokens}")
        elif trajectory.reward != pytest.approx(reward, abs=1e-3):
            wrong.append(f"{job.id}: reward {trajectory.reward} want {reward}")
    return wrong, len(recorded)

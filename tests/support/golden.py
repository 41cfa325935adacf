"""The authors' records (tests/golden/README.md): logits, and all runs of a family in one crowd."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from server.types import Job
from tests.support.jobs import make_job, run
from tests.support.models import GOLDEN, Pair

FILES = ("trajectories.json", "blocks.json")  # a family has one or both
SAME_NAMES = ("steps", "deprioritize_eos", "gradient_steps", "eta", "max_tokens", "temperature", "top_p", "top_k")
OPTIONAL = ("block_length", "schedule", "cfg_scale", "confidence_threshold")


def recorded_logits(family: str) -> list[tuple[Tensor, Tensor, float]]:
    """(canvas with its prompt, logits of its masked rows, the size that deviations of float64 are measured by)."""
    folder = GOLDEN / f"{family}-tiny"
    cases, tensors = json.loads((folder / "units.json").read_text()), load_file(folder / "units.safetensors")
    if isinstance(cases, list):  # of logits alone, from a network whose norms and rotations are in float32
        logits = [tensors[f"logits{index}"].double() for index in range(len(cases))]
        canvases = [torch.tensor(case["ids"] + case["canvas"]) for case in cases]
        return [(canvas, each, float(each.abs().max())) for canvas, each in zip(canvases, logits, strict=True)]
    return [(tensors[f"{index}.canvas"], tensors[f"{index}.logits_masked"], 1.0) for index in range(4)]


def golden_jobs(pair: Pair, family: str) -> Iterator[tuple[Job, list[int], float]]:
    """(job, recorded tokens, recorded final reward) for every prompt of every case."""
    for path in filter(Path.is_file, (GOLDEN / f"{family}-tiny" / file for file in FILES)):
        for case in json.loads(path.read_text()):
            values = pair.blocks | {key: case[key] for key in (*SAME_NAMES, *OPTIONAL) if key in case}
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

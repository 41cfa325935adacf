"""The engine replays the authors' recorded runs token for token (tests/golden/README.md), all cases in one crowd."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.types import DiffusionParams, GuidanceParams, Job, Message, SamplingParams, WeightedReward
from server.wire.messages import Failed, Finished
from server.worker.runner import Runner

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = ("trajectories.json", "blocks.json")  # a family has one or both


def golden_jobs(pair: Any, family: str) -> Iterator[tuple[Job, list[int], float]]:
    """(job, recorded tokens, recorded final reward) for every prompt of every case."""
    for path in filter(Path.is_file, (GOLDEN / f"{family}-tiny" / file for file in FILES)):
        for case in json.loads(path.read_text()):
            diffusion = DiffusionParams(
                steps=case["steps"],
                algorithm=case["alg"],
                deprioritize_eos=case["deprioritize_eos"],
                **{key: case[key] for key in ("block_length", "schedule", "cfg_scale") if key in case},
            )
            guidance = GuidanceParams(
                method=case["guidance"],
                reward_models=(WeightedReward("rm"),),
                gradient_steps=case["gradient_steps"],
                eta=case["eta"],
            )
            for index, prompt in enumerate(case["prompts"]):
                conversation = (Message("user", prompt),)
                sampling = SamplingParams(
                    max_tokens=case["max_tokens"],
                    temperature=case["temperature"],
                    top_p=case["top_p"],
                    top_k=case["top_k"],
                    ignore_eos=True,
                )
                job = Job(
                    id=f"{path.stem}/{case['id']}[{index}]",
                    prompt_ids=tuple(pair.loaded.tokenizer.render_chat(conversation)),
                    conversation=conversation,
                    sampling=sampling,
                    diffusion=diffusion,
                    guidance=guidance,
                )
                yield job, case["expected"]["token_ids"][index], case["expected"]["rewards"][index][0]


def replay(pair: Any, family: str) -> tuple[list[str], int]:
    """Mismatches, and how many runs there were."""
    runner = Runner(pair.loaded, pair.rewards)
    expected = {}
    for job, tokens, reward in golden_jobs(pair, family):
        expected[job.id] = (tokens, reward)
        runner.add(job, now=0.0)
    wrong = []
    seen = set()
    while runner.has_work:
        for event in runner.step():
            assert not isinstance(event, Failed), event
            if isinstance(event, Finished):
                seen.add(event.job_id)
                (trajectory,) = event.result.trajectories
                tokens, reward = expected[event.job_id]
                if list(trajectory.token_ids) != tokens:
                    wrong.append(f"{event.job_id}: {trajectory.token_ids} want {tokens}")
                elif trajectory.reward != pytest.approx(reward, abs=1e-3):
                    wrong.append(f"{event.job_id}: reward {trajectory.reward} want {reward}")
    assert seen == set(expected)
    return wrong, len(expected)


def test_every_recorded_run_comes_out_in_float64(pair64: Any, family: str) -> None:
    wrong, count = replay(pair64, family)
    assert not wrong
    assert count > 20


def test_every_recorded_run_comes_out_in_float32(pair32: Any, family: str) -> None:
    wrong, _ = replay(pair32, family)
    assert not wrong


@pytest.mark.parametrize("number", range(0, 40, 8))
def test_the_plain_loop_replays_recorded_runs(pair64: Any, family: str, number: int) -> None:
    job, tokens, reward = list(golden_jobs(pair64, family))[number]
    result = pair64.plain.run(job)
    assert result.token_ids == [tokens]
    assert result.rewards[0] == pytest.approx(reward, abs=1e-3)

"""A short job of the bundled models on a device, for counting what its denoising steps do."""

from __future__ import annotations

import torch

from demo import BUNDLED_NAME, bundled_model_path, bundled_reward_models
from server.types import DiffusionParams, GuidanceParams, Job, Message, SamplingParams, WeightedReward
from server.wire.config import WorkerConfig
from server.wire.messages import Failed, Finished
from server.worker.runner import Runner
from server.worker.service import load

TOKENS = 32


def load_bundled(device: torch.device) -> Runner:
    """The bundled models, ready on a device."""
    rewards = {name: str(path) for name, path in bundled_reward_models().items()}
    config = WorkerConfig(
        str(bundled_model_path()), device=str(device), reward_models=rewards, served_model_name=BUNDLED_NAME
    )
    return load(config).runner


def run_job(runner: Runner, guided: bool) -> int:
    """Run one job of four trajectories; how many denoising steps they made. RuntimeError when it fails."""
    conversation = (Message("user", "Tell me about a garden."),)
    reward = next(iter(runner.reward_models))
    runner.add(
        Job(
            id=f"guided-{guided}",
            prompt_ids=tuple(runner.loaded.tokenizer.render_chat(conversation)),
            sampling=SamplingParams(max_tokens=TOKENS, best_of=4, seed=1, temperature=0.7),
            diffusion=DiffusionParams(steps=TOKENS),
            guidance=GuidanceParams("entrgi", (WeightedReward(reward),)) if guided else GuidanceParams(),
            conversation=conversation,
        ),
        runner.clock(),
    )
    before, finished = runner.stats.denoising_steps, False
    while runner.has_work:
        for event in runner.step():
            if isinstance(event, Failed):
                raise RuntimeError(event.message)
            finished = finished or isinstance(event, Finished)
    if not finished:
        raise RuntimeError("the job got no answer")
    return runner.stats.denoising_steps - before

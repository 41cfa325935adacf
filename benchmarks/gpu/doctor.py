"""The first part of `make gpu-check`: the machine."""

from __future__ import annotations

import torch

from benchmarks.gpu.part import Given, Report
from demo import bundled_model_path, bundled_reward_models
from server.doctor import diagnose
from server.wire.config import RewardSource, WorkerConfig


def device(given: Given) -> Report:
    """What `make doctor` finds, and the device's properties. What is in the way is told; nothing of it is a result."""
    rewards = tuple(RewardSource(name, str(path)) for name, path in bundled_reward_models().items())
    lines = [str(finding) for finding in diagnose(WorkerConfig(str(bundled_model_path()), rewards))]
    if given.device.type == "cuda":
        of = torch.cuda.get_device_properties(given.device)
        size = f"{of.total_memory / 1e9:.1f} GB, {of.multi_processor_count} multiprocessors"
        lines.append(f"{of.name}, compute capability {of.major}.{of.minor}, {size}")
    return {"text": "\n".join(lines)}

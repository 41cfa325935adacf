"""`python -m server doctor`: whether this machine can serve what the settings name; each line ok, or what to do.

It loads no weights. What must be tried on the device itself (attention, kernels) is tried on a small case, as when a
server loads.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub import constants
from huggingface_hub.errors import DryRunError, HfHubHTTPError

from kernels import varlen
from kernels.cpp.build import library
from kernels.dispatch import try_triton
from server.errors import ConfigurationError
from server.hub import ALLOWED_FILES
from server.rewards.classifier import find_classifier
from server.wire.config import RewardSource, WorkerConfig
from server.worker import memory, nvidia
from server.worker.service import resolve_device, resolve_dtype

GB = 10**9
USUAL_HEAD_SIZE = 128


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, what was found, and what to do about it (nothing where all is well)."""

    what: str
    found: str
    advice: str = ""

    def __str__(self) -> str:
        line = f"{'ok   ' if not self.advice else 'WRONG'} {self.what:<10} {self.found}"
        return f"{line}\n{'':<17}{self.advice}" if self.advice else line


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model's files: bytes of weights, and how many of all bytes are still to be fetched."""

    weights: int
    missing: int


def diagnose(config: WorkerConfig) -> Iterator[Finding]:
    """Findings about one worker with this configuration, as they are made."""
    yield _driver()
    try:
        device = resolve_device(config.device, config.rank)
    except ConfigurationError as error:
        yield Finding("device", config.device, error.message)
        return
    cuda = torch.version.cuda
    built = f"{torch.__version__}, {f'for CUDA {cuda}' if cuda else 'a build for CPUs'}; serves on {device}"
    if device.type == "cuda":
        built += f" ({torch.cuda.get_device_name(device)})"
    yield Finding("torch", built)
    yield _compiler(device)
    if device.type == "cuda":
        yield _triton(device)
        dtype = resolve_dtype(config.dtype, device)
        why = varlen.unavailable("varlen", device, dtype, USUAL_HEAD_SIZE)
        advice = f"{why}: attention is computed row by row, and there are no CUDA graphs" if why else ""
        yield Finding("attention", "sdpa" if why else "varlen", advice)
    reward_device = device
    if config.reward_device is not None:
        try:
            reward_device = resolve_device(config.reward_device, config.rank, setting="reward_device")
        except ConfigurationError as error:
            yield Finding("device", config.reward_device, error.message)
            return
    yield from _models(config, device, reward_device)


def _driver() -> Finding:
    count, loaded, why = nvidia.gpus(), nvidia.driver(), nvidia.why_unused()
    found = f"{count} NVIDIA GPU{'s' * (count != 1)}" + (f", driver {loaded}" if loaded else "")
    return Finding("driver", found, why)


def _compiler(device: torch.device) -> Finding:
    """What compiles the C++ passes of a CPU, or the launchers of Triton's kernels."""
    if device.type == "cpu":
        advice = "install g++ (or clang++ and OpenMP): without it everything is slower by a multiple"
        return Finding("compiler", "C++, for the kernels of a CPU", "" if library() is not None else advice)
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    compiler = next(filter(None, map(shutil.which, filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")))), None)
    lacking = [what for what, there in (("a C compiler", compiler), (f"{header}", header.exists())) if not there]
    advice = f"Triton needs {' and '.join(lacking)} (Debian: gcc, python3-dev)" if lacking else ""
    return Finding("compiler", compiler or "none", advice)


def _triton(device: torch.device) -> Finding:
    """Its version, and whether one kernel compiles and runs."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return Finding("triton", "none", "install torch's CUDA build, which brings it: plain torch kernels run instead")
    return Finding("triton", version, try_triton(device))


def _models(config: WorkerConfig, device: torch.device, reward_device: torch.device) -> Iterator[Finding]:
    """Weights against memory, what must be fetched against the disk, and whether the hub can be had where it must."""
    missing, weights = 0, {device: 0, reward_device: 0}
    for name, where in ((config.model, device), *((each.path, reward_device) for each in config.reward_models)):
        try:
            checkpoint = checkpoint_of(name)
        except (HfHubHTTPError, OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            yield Finding("hub", name, f"{reason}: check the name, the network, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE")
            continue
        weights[where] += checkpoint.weights
        missing += checkpoint.missing
        yield Finding("model", f"{name}: {_gb(checkpoint.weights)} of weights, {_gb(checkpoint.missing)} to fetch")
    yield from _labels(config.reward_models)
    cache = Path(constants.HF_HUB_CACHE)
    disk = shutil.disk_usage(next(each for each in (cache, *cache.parents) if each.exists())).free
    advice = "free some, or set HF_HOME to a larger disk" if missing > disk else ""
    yield Finding("disk", f"{_gb(disk)} free at {cache}, {_gb(missing)} needed", advice)
    advice = "take smaller models, a larger device, or `reward_device`; `dtype: bfloat16` halves float32 weights"
    for where, held in weights.items():
        free = memory.free_bytes(where)
        found = (
            f"{_gb(free)} free on {where}, {_gb(held)} for weights; of the rest {config.memory_fraction:.0%} is used"
        )
        yield Finding("memory", found, advice if held >= free else "")


def _labels(sources: Iterable[RewardSource]) -> Iterator[Finding]:
    """What is the reward of each checkpoint that is a folder here; to find an adapter's base may mean to fetch it."""
    for each in sources:
        if not (Path(each.path).expanduser() / "config.json").is_file():
            continue
        try:
            found = find_classifier(each.name, each.path, each.label, each.output, each.input)
        except ConfigurationError as error:
            yield Finding("reward", each.path, error.message)
            continue
        of = f"the {found.reading.output} of label {found.reading.label!r}" if found.reading.label else "its one logit"
        kind = "a gradient" if found.input is None else f"no gradient, reads the {found.input}"
        yield Finding("reward", f"{each.name}: {of}; {kind}")


def checkpoint_of(name: str) -> Checkpoint:
    """Of a local folder or a hub id, perhaps with `@revision`: without the hub, of what was fetched before. Raises what
    huggingface_hub raises where nothing was."""
    if (folder := Path(name).expanduser()).is_dir():
        return _of_folder(folder)
    repository, _, revision = name.partition("@")
    snapshot = partial(
        huggingface_hub.snapshot_download,
        repository,
        revision=revision or None,
        allow_patterns=ALLOWED_FILES,
        ignore_patterns=["*/*"],
    )
    try:
        planned = snapshot(dry_run=True)
    except DryRunError:
        return _of_folder(Path(snapshot(local_files_only=True)))
    sizes = [(each, each.file_size or 0) for each in planned]
    weights = sum(size for each, size in sizes if each.filename.endswith(".safetensors"))
    return Checkpoint(weights, sum(size for each, size in sizes if each.will_download))


def _of_folder(folder: Path) -> Checkpoint:
    return Checkpoint(sum(path.stat().st_size for path in folder.glob("*.safetensors")), 0)


def _gb(size: int) -> str:
    return f"{size / GB:.1f} GB"


def main(config: WorkerConfig) -> int:
    """Print the findings. Returns the exit status: 1 where something is wrong."""
    wrong = False
    for finding in diagnose(config):
        print(finding, flush=True)
        wrong |= bool(finding.advice)
    return int(wrong)

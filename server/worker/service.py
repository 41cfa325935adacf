"""What the worker process loads: the diffusion model, the reward models, the runner on them, and a warm-up.

Everything that can be wrong with a setting or a checkpoint is found here, before the server calls itself
ready.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from kernels import varlen
from kernels.dispatch import Products, choose_products, try_triton
from kernels.linear import activation_dtype
from kernels.settings import settings
from kernels.warm_up import warm_up as warm_up_kernels
from server.budget import Budget
from server.errors import ConfigurationError, quote
from server.models.acceleration import accelerate, choose_attention, graph_trunk
from server.models.graphs import GraphedTrunk
from server.models.loading import LoadedDiffusionModel, checkpoint_folder, load_diffusion_model
from server.models.lora import adapter_bytes, load_adapter
from server.models.weights import checkpoint_dtype
from server.rewards.classifier import find_classifier
from server.rewards.encoder import Encoder, load_encoder
from server.rewards.graphs import GraphedPasses, graph_passes
from server.rewards.reward_model import RewardModel, load_reward_model
from server.rewards.text_reward import SCORE_TOKENS
from server.types import (
    DiffusionParams,
    EngineInfo,
    GuidanceParams,
    Job,
    Message,
    SamplingParams,
    Way,
    WeightedReward,
)
from server.wire.config import RewardSource, WorkerConfig
from server.wire.messages import AdaptersSet, Failed
from server.wire.stats import RunnerStats
from server.worker import memory, nvidia
from server.worker.failures import Attempt
from server.worker.runner import Runner
from server.worker.savings import Savings
from server.worker.scoring import Scorer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedService:
    """The worker loop's `Service` on real models."""

    info: EngineInfo
    runner: Runner
    scorer: Scorer
    device: torch.device
    max_lora_rank: int = 64

    def check_device(self) -> None:
        """Compute one number and wait for it; raises when the device is lost."""
        torch.ones(1, device=self.device).sum().item()

    def set_adapters(self, folders: Mapping[str, str]) -> AdaptersSet:
        """Have exactly these adapters, by version, for jobs that come from now on; jobs that are here keep theirs."""
        present = self.runner.adapters
        held = {version: adapter for version, adapter in present.items() if version in folders}
        refused = {}
        for version in folders.keys() - held.keys():
            with Attempt() as attempt:
                try:
                    held[version] = load_adapter(self.runner.loaded.model, Path(folders[version]), self.max_lora_rank)
                except ConfigurationError as error:
                    refused[version] = error.message
            if attempt.ran_out:
                refused[version] = "there is not enough memory for it"
        self.runner.adapters = held
        return AdaptersSet(sorted(held), refused)


def resolve_device(name: str, rank: int = 0, *, setting: str = "device") -> torch.device:
    """The torch device that worker number `rank` takes for a setting: the named one or, of CUDA devices, the one with
    a number larger by `rank`. Raises ConfigurationError for an unknown or absent one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda":
            device = torch.device("cuda", (device.index or 0) + rank)
        torch.ones(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        where = f" by worker {rank} (data_parallel)" if rank else ""
        raise ConfigurationError(f"{setting}: {quote(name)} cannot be used{where}: {reason}") from error
    return device


def resolve_dtype(name: str, device: torch.device, own: torch.dtype | None = None) -> torch.dtype:
    """The torch dtype of a setting; `own` is the checkpoint's.

    "auto" is bfloat16 on a GPU, and on a CPU where the checkpoint is in it and the processor multiplies such matrices;
    else float32. No timing has a say, so a server gives the same tokens at every start.
    """
    if name == "auto":
        natively = device.type == "cuda" or (own == torch.bfloat16 and settings().bfloat16)
        return torch.bfloat16 if natively else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def attention_way(model: str, backend: str, device: torch.device, dtype: torch.dtype, head_size: int) -> Way:
    """Which attention a model has and, of one that is slow on its device, why."""
    fast = "varlen" if device.type == "cuda" else "cpp"
    why = "" if backend == fast else varlen.unavailable(fast, device, dtype, head_size) or "attention_backend says so"
    return Way("attention", model, backend, why)


def default_threads(device: torch.device, workers: int = 1) -> int:
    """CPU threads for each of `workers` workers when none are configured; 0 leaves torch's own number.

    One core is left to the HTTP process: OpenMP threads wait for each other by spinning, so a worker with as many
    threads as cores loses most of its speed as soon as anything else runs. OMP_NUM_THREADS, when set, is
    taken as meant.
    """
    if device.type != "cpu" or "OMP_NUM_THREADS" in os.environ:
        return 0
    return max(1, (len(os.sched_getaffinity(0)) - 1) // workers) if hasattr(os, "sched_getaffinity") else 0


def load(config: WorkerConfig) -> LoadedService:
    """Load the models that the configuration names and run a guided job on each reward model.

    Raises ConfigurationError when a setting or a checkpoint is wrong.
    """
    transformers_logging.disable_progress_bar()  # standard error carries log lines
    device = resolve_device(config.device, config.rank)
    ways = [Way("device", "", str(device), nvidia.why_unused() if config.device == "auto" else "")]
    if threads := config.threads or default_threads(device, config.data_parallel):
        torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # kernels are launched on the current device, whatever their tensors are on
    reward_device = device
    if config.reward_device is not None:
        reward_device = resolve_device(config.reward_device, config.rank, setting="reward_device")
    trouble = try_triton(device) or try_triton(reward_device)
    own = checkpoint_dtype(checkpoint_folder(config.model)) if config.dtype == "auto" else None
    dtype = resolve_dtype(config.dtype, device, own)
    if activation_dtype(dtype, device) != dtype:
        logger.info("this processor has no instructions for %s: weights keep it, arithmetic is float32", config.dtype)
    savings = Savings.without(config.disable_savings)
    loaded = load_diffusion_model(
        config.model, dtype=dtype, device=device, attention=config.attention, block_length=config.block_length
    )
    model = _fit(loaded, config)
    if config.compile and model.info.blocks_from:
        raise ConfigurationError(
            "compile: cached prefixes cannot be compiled, and a block-causal model has them always"
        )
    accelerate(model.model, model.info.context_length, config.attention_backend, compiled=config.compile)
    head_size, decoder = model.model.shape.head_size, model.model.model
    of = device, model.model.activation_dtype, head_size
    ways.append(attention_way(model.info.id, decoder.attention_backend, *of))
    rewards = {each.name: _load_reward(each, config, model, dtype, reward_device) for each in config.reward_models}
    reward_models = {name: reward for name, reward in rewards.items() if isinstance(reward, RewardModel)}
    encoders = {name: reward for name, reward in rewards.items() if isinstance(reward, Encoder)}
    for reward in reward_models.values():
        where = reward.device, reward.activation_dtype, reward.shape.head_size
        reward.attention_backend = choose_attention(config.attention_backend, *where)
        ways.append(attention_way(reward.name, reward.attention_backend, *where))
    if config.cuda_graphs and device.type == "cuda":
        ways += _graph(config, model, reward_models.values())
    budget, largest = _budgets(config, model, reward_models.values(), device)
    products = _products(config, model, reward_models.values(), budget)
    ways.append(Way("kernels", "", products.backend, trouble))
    logger.info("kernels: %s%s", products.backend, f" ({products.why})" if products.why else "")
    how: dict[str, Any] = {"savings": savings, "backend": products.backend}
    runner = Runner(model, reward_models, encoders, budget=budget, largest=largest, **how)
    warm_up(runner, model, reward_models)
    runner.denoiser.stats = RunnerStats()  # nobody asked for the warm-up
    info = EngineInfo(
        model=model.info,
        reward_models=tuple(reward.info for reward in rewards.values()),
        device=f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device),
        kernel_backend=products.backend,
        largest=largest,
        shared=budget,
        ways=tuple(ways),
    )
    for way in ways:
        if way.why:
            logger.warning("%s: %s, because %s", " of ".join(filter(None, (way.part, way.model))), way.how, way.why)
    logger.info("ready: %s with %d reward models on %s", info.model.id, len(rewards), info.device)
    scorer = Scorer(rewards, budget.reward_tokens if reward_models else SCORE_TOKENS)
    return LoadedService(info, runner, scorer, device, config.max_lora_rank)


def _load_reward(
    source: RewardSource, config: WorkerConfig, model: LoadedDiffusionModel, dtype: torch.dtype, device: torch.device
) -> RewardModel | Encoder:
    """A reward of the settings: with a gradient where it is a causal model, else without."""
    found = find_classifier(source.name, source.path, source.label, source.output, source.input)
    if found.input is not None:
        return load_encoder(found, dtype=dtype, device=device)
    return load_reward_model(
        found,
        diffusion_tokenizer=model.tokenizer,
        diffusion_vocab_size=model.model.vocab_size,
        dtype=dtype,
        device=device,
        vocab_fallback=config.vocab_fallback,
        table_device=model.model.device,
    )


def warm_up(runner: Runner, model: LoadedDiffusionModel, reward_models: Collection[str]) -> None:
    """Have all forms of Triton's kernels compiled, where they are what runs, and one small job run through the runner
    for each reward model, guided by it; without any, an unguided one.

    Raises RuntimeError when a job fails.
    """
    of, tables = model.model, [runner.reward_models[name].table for name in reward_models]
    warm_up_kernels(runner.denoiser.backend, of.activation_dtype, of.vocab_size, of.device, tables)
    conversation = (Message("user", "Hello"),)
    tokenizer = model.tokenizer
    prompt = tokenizer.render_chat(conversation) if tokenizer.has_chat_template else tokenizer.encode("Hello")
    guidances = [GuidanceParams("entrgi", (WeightedReward(name),)) for name in reward_models]
    own: dict[str, Any] = {**model.info.diffusion_defaults, "blocks_from": model.info.blocks_from}
    sampling, diffusion = SamplingParams(max_tokens=8), DiffusionParams(steps=2, **own)
    for index, guidance in enumerate(guidances or [GuidanceParams()]):
        job = Job(f"warm-up-{index}", tuple(prompt), sampling, diffusion, guidance, conversation=conversation)
        runner.add(job, runner.clock())
    while runner.has_work:
        for event in runner.step():
            if isinstance(event, Failed):
                raise RuntimeError(event.message)


def _graph(config: WorkerConfig, model: LoadedDiffusionModel, reward_models: Iterable[RewardModel]) -> list[Way]:
    """Let what can run as CUDA graphs run so from now on; what does, and why the others do not."""
    unfit = {reward.name: graph_passes(reward) for reward in reward_models}
    if config.compile:
        unfit[model.info.id] = "it is compiled"
    elif model.info.blocks_from:
        unfit[model.info.id] = "its steps continue cached blocks"
    else:
        unfit[model.info.id] = graph_trunk(model.model)
    return [Way("graphs", name, "off" if why else "on", why) for name, why in unfit.items()]


def _fit(model: LoadedDiffusionModel, config: WorkerConfig) -> LoadedDiffusionModel:
    """The model under its served name, with its context cut to `max_model_len`."""
    info = model.info
    if config.max_model_len is not None:
        if config.max_model_len > info.context_length:
            more = f"{config.max_model_len} is more than the model's context length, {info.context_length}"
            raise ConfigurationError(f"max_model_len: {more}")
        canvas = min(info.default_max_tokens, max(1, config.max_model_len // 2))  # so that a prompt fits too
        info = replace(info, context_length=config.max_model_len, default_max_tokens=canvas)
    if config.served_model_name is not None:
        info = replace(info, id=config.served_model_name)
    return replace(model, info=info)


def _products(
    config: WorkerConfig, model: LoadedDiffusionModel, reward_models: Collection[RewardModel], budget: Budget
) -> Products:
    """How the products with the vocabulary are computed: as the setting says or, for "auto", by what they would take
    for as many rows as may be steered at once. Raises ConfigurationError for what cannot run here."""
    diffusion = model.model
    widths = [reward.table.shape[1] for reward in reward_models]
    try:
        return choose_products(
            config.kernels,
            diffusion.device,
            diffusion.activation_dtype,
            vocab_size=diffusion.vocab_size,
            widths=widths,
            rows=budget.guided_rows,
        )
    except ValueError as error:
        raise ConfigurationError(f"kernels: {error}") from error


def _budgets(
    config: WorkerConfig, model: LoadedDiffusionModel, reward_models: Collection[RewardModel], device: torch.device
) -> tuple[Budget, Budget]:
    """What may share a denoising step, and what one trajectory may take: computed, where the settings do not say."""
    # With reward models on another device both parts of the work must find their memory, each on its own.
    free = min(memory.free_bytes(each) for each in {device, *(reward.device for reward in reward_models)})
    if device.type != "cuda":
        free //= config.data_parallel
    free = max(0, free - config.adapters * adapter_bytes(model.model, config.max_lora_rank))
    if device.type == "cpu":
        memory.keep_large_blocks(free * (1 - config.memory_fraction))
    block_causal = model.info.blocks_from is not None
    footprint = memory.Footprint.of(model.model, reward_models, block_causal=block_causal, kernels=config.kernels)
    for reward in reward_models:
        if reward.graphed_passes is not None:
            reward.graphed_passes.recorded.key_share = memory.cached_share(reward)
    runs = model.model.trunk, *(reward.graphed_passes for reward in reward_models)
    graphed = [each.recorded for each in runs if isinstance(each, GraphedTrunk | GraphedPasses)]
    held = footprint.graph_tokens(free, config.memory_fraction) if graphed else 0
    for graphs in graphed:
        graphs.most_tokens = held
    context = model.info.context_length
    shared, largest = footprint.budgets(
        free, config.memory_fraction, device.type, context_length=context, graph_tokens=held
    )
    shared = replace(shared, trajectories=config.batch_trajectories)
    if config.batch_tokens:
        shared, largest = replace(shared, tokens=config.batch_tokens), replace(largest, tokens=config.batch_tokens)
    logger.info("budgets of a step, with %d MB free: %s; one trajectory: %s", free >> 20, shared, largest)
    return shared, largest

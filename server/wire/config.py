"""What the processes are told at their start.

A setting of the user's has one home: a field with its type, bounds, description and default. Those that a process takes
as they stand are declared here, and `server.settings.Settings` inherits them; the configurations below inherit them too
and add what the composition root works out, and what only tests and measurements set.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from msgspec import Meta, Struct

from server.types import Attention, RewardInput, RewardOutput

NAME = r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,199}$"
"""What a model, a reward model, a scorer or an adapter may be called."""
WORKER_COMMAND = (sys.executable, "-P", "-m", "server.worker.loop")
TARGET = (
    r"^(python:[A-Za-z_][\w.]*:[A-Za-z_]\w*|"
    r"(entrgi|vllm-score|vllm-classify|tei-rerank)\+https?://[^\s/?#@]+(/[^\s?#@]*)?)\Z"
)


def says(description: str, **bounds: Any) -> Meta:
    """What a setting is, in the words of `--help`, and its bounds."""
    return Meta(description=description, **bounds)


Device = Annotated[str, Meta(pattern=r"^(auto|cpu|cuda(:\d{1,3})?|mps|xpu(:\d{1,3})?)$")]
AtLeastOne = Annotated[int, Meta(ge=1)]


class RewardSource(Struct, frozen=True, forbid_unknown_fields=True):
    """A reward model as the settings name it. `path` is a local folder or a hub id, which `@REVISION` pins. `label` is
    the name of a classifier's label, or its number; `input` is for encoders."""

    name: Annotated[str, Meta(pattern=NAME)]
    path: Annotated[str, Meta(pattern=r"\S")]
    label: int | str | None = None
    output: RewardOutput = "logit"
    input: RewardInput | None = None


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """Settings for the worker processes. The descriptions are those of `--help`; `attention_backend`, `compile` and
    `cuda_graphs` are explained in `server.models.acceleration`, the three about batches in `server.worker.memory`."""

    device: Annotated[Device, says("auto, cpu, cuda or cuda:N")] = "auto"
    reward_device: Annotated[
        Device | None, says("device of the reward models, as cuda:1 or cpu; none: that of the diffusion model")
    ] = None
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32", "float64"],
        says("weights' type; auto: bfloat16 on a GPU, and on a CPU that multiplies it for a model in it; else float32"),
    ] = "auto"
    attention_backend: Annotated[
        Literal["auto", "varlen", "cpp", "sdpa"],
        says("attention over packed sequences: torch's varlen kernel, our pass in C++, or plain, a row at a time"),
    ] = "auto"
    compile: Annotated[bool, says("torch.compile of the diffusion model's blocks; a minute or more at start")] = False
    cuda_graphs: Annotated[
        bool, says("CUDA graphs of both models' passes over small batches, on a GPU and where they can work")
    ] = True
    kernels: Annotated[
        Literal["auto", "fused", "library"],
        says("products with the vocabulary on a GPU: in our Triton kernels, or the library's; auto: by estimate"),
    ] = "auto"
    attention: Annotated[
        Attention,
        says("what the model was trained for; auto: block_causal where the checkpoint says so, else full"),
    ] = "auto"
    block_length: Annotated[
        AtLeastOne | None,
        says("block length of requests that name none; none: the checkpoint's or, where that has none, the family's"),
    ] = None
    max_model_len: Annotated[AtLeastOne | None, says("lower the context length to this many tokens")] = None
    vocab_fallback: Annotated[
        Literal["unk", "zero"], says("reward embedding of a token that the reward vocabulary lacks")
    ] = "unk"
    threads: Annotated[
        int, says("CPU threads of each worker; 0: all cores but one, shared by the workers", ge=0, le=1024)
    ] = 0
    data_parallel: Annotated[
        int, says("worker processes: with `device` cuda one on each GPU from the named one on", ge=1, le=64)
    ] = 1
    batch_tokens: Annotated[
        int, says("canvas tokens in one denoising step; 0: computed from the free memory", ge=0)
    ] = 0
    batch_trajectories: Annotated[int, says("trajectories in one denoising step", ge=1)] = 256
    memory_fraction: Annotated[
        float, says("share of the memory that is free after loading that batches may take", gt=0, le=1)
    ] = 0.8
    max_lora_rank: Annotated[int, says("largest rank of an adapter", ge=1, le=4096)] = 64
    plugins: Annotated[
        tuple[str, ...],
        says("Python module on PYTHONPATH that server and workers import; it may register guidance methods"),
    ] = ()
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], says("least level logged")] = "INFO"
    log_format: Annotated[Literal["auto", "json", "console"], says("auto: console on a terminal")] = "auto"


@dataclass(frozen=True)
class WorkerConfig(WorkerSettings):
    """What one worker process needs to load the models and run; it crosses the wire as the first message.

    `model` is a local folder or a hub id, which `@REVISION` pins. Of `reward_models` the first is the default. Of
    `data_parallel` workers this one is number `rank`: on a GPU it takes the device
    `rank` places after the named one, on a CPU its share of the threads. `adapters` is for how many LoRA adapters
    memory is set aside. `disable_savings` names fields of `savings.Savings` to do without, for measurements.
    """

    model: str
    reward_models: tuple[RewardSource, ...] = ()
    served_model_name: str | None = None
    rank: int = 0
    adapters: int = 0
    disable_savings: tuple[str, ...] = ()
    heartbeat_seconds: float = 1.0


class OutsideScorer(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A scorer that is not loaded here. `target` is python:MODULE:FUNCTION or the address of a server, with the kind of
    server before it; `model` is the name that this server has for it; `key_env` names the environment variable with the
    server's API key; `label` is the class, from 0, whose probability is the score. One call may take `timeout_seconds`
    and is made again up to `retries` times; `max_concurrency` calls are made at a time, by default 8, or 1 of a
    function. Raises ValueError for what has no effect with the target."""

    name: Annotated[str, Meta(pattern=NAME)]
    target: Annotated[str, Meta(pattern=TARGET)]
    model: str | None = None
    key_env: str | None = None
    label: Annotated[int, Meta(ge=0)] | None = None
    timeout_seconds: Annotated[float, Meta(gt=0, le=86_400)] = 30.0
    retries: Annotated[int, Meta(ge=0, le=20)] = 2
    max_concurrency: Annotated[int, Meta(ge=1, le=1000)] | None = None

    def __post_init__(self) -> None:
        idle = {"python": ("model", "key_env"), "tei-rerank": ("model",)}.get(self.kind, ())
        for name in idle:
            if getattr(self, name) is not None:
                raise ValueError(f"`{name}` has no effect with {self.kind}")
        if urlsplit(self.target.partition("+")[2]).port == 0:  # any other that is none raises ValueError itself
            raise ValueError("there is no port 0")
        if (self.label is None) == (self.kind == "vllm-classify"):
            raise ValueError("`label`, a class from 0, goes with vllm-classify and with nothing else")

    @property
    def kind(self) -> str:
        """What answers: python, entrgi, vllm-score, vllm-classify or tei-rerank."""
        return self.target.partition(":")[0].partition("+")[0]

    @property
    def calls(self) -> int:
        """How many are made at a time."""
        return self.max_concurrency or (1 if self.kind == "python" else 8)


@dataclass(frozen=True, kw_only=True)
class FrontSettings:
    """Settings for the process that keeps the workers."""

    scorers: Annotated[
        tuple[OutsideScorer, ...],
        says(
            "outside scorer as {name, target, model, key_env, label, timeout_seconds, retries, max_concurrency}, "
            "which is JSON outside of YAML; repeatable"
        ),
    ] = ()

    max_loras: Annotated[int, says("LoRA adapters loaded at the same time", ge=1, le=1000)] = 8
    max_queue: Annotated[int, says("prompts in flight, waiting ones included", ge=1, le=100_000)] = 256
    watchdog_seconds: Annotated[
        float, says("a worker without progress for this long is killed and replaced", gt=0, le=86_400)
    ] = 120.0
    spare_worker: Annotated[
        bool, says("keep one more process at hand (about 300 MB), so that a restart skips the imports")
    ] = True


@dataclass(frozen=True)
class EngineConfig(FrontSettings):
    """How the HTTP process keeps its workers, `worker.data_parallel` of them.

    Loading and warming up may take `start_limit_seconds`. A restart after a death before ready waits `backoff_seconds`,
    doubled each time up to `max_backoff_seconds`. `stop_grace_seconds` is how long a worker may take to leave by
    itself. `worker_command` gets the socket's number as its last argument. `loras` is name -> folder of the adapters to
    begin with.
    """

    worker: WorkerConfig
    loras: dict[str, str] = field(default_factory=dict)
    start_limit_seconds: float = 3600.0
    backoff_seconds: float = 0.5
    max_backoff_seconds: float = 30.0
    stop_grace_seconds: float = 5.0
    worker_command: tuple[str, ...] = WORKER_COMMAND

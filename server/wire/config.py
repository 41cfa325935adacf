"""Plain values for the engine and its worker. The composition root fills them from the settings."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Literal

WORKER_COMMAND = (sys.executable, "-P", "-m", "server.worker.loop")


@dataclass(frozen=True, slots=True)
class BudgetSettings:
    """What is fixed of the budgets of a denoising step (`types.Budget` has the units); 0 leaves it to be computed from
    the memory that is free after loading, of which the engine may take `memory_fraction`."""

    tokens: int = 0
    guided_rows: int = 0
    reward_tokens: int = 0
    trajectories: int = 256
    memory_fraction: float = 0.8


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """What the worker process needs to load the models and run; it crosses the wire as the first message.

    `model` and the values of `reward_models` (name -> model, in order: the first is the default) are local
    folders or hub ids; `revision` pins a hub id of the diffusion model. `dtype` is bfloat16, float16, float32
    or float64, `device` as torch names it; `auto` is a GPU in bfloat16 where there is one, else the CPU in
    float32. `reward_device` None is `device`; `attention_backend`, `compile` and `cuda_graphs` are explained in
    `server.models.acceleration`, `reward_cuda_graphs` in `server.rewards.graphs`.
    `max_model_len` (tokens) lowers the model's context length. `threads` 0: on the CPU all
    cores but one. Of `data_parallel` workers this is number `rank`: it takes the CUDA devices that many after those
    named, or its share of the CPU's threads. `plugins` are modules to import
    before anything is loaded (`server.methods`). `disable_savings` names fields of `savings.Savings` to do without.
    """

    model: str
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    reward_device: str | None = None
    attention_backend: str = "auto"
    compile: bool = False
    cuda_graphs: bool = False
    reward_cuda_graphs: bool = False
    reward_models: dict[str, str] = field(default_factory=dict)
    vocab_fallback: Literal["unk", "zero"] = "unk"
    max_model_len: int | None = None
    served_model_name: str | None = None
    threads: int = 0
    rank: int = 0
    data_parallel: int = 1
    plugins: tuple[str, ...] = ()
    disable_savings: tuple[str, ...] = ()
    budget: BudgetSettings = BudgetSettings()
    heartbeat_seconds: float = 1.0
    log_level: str = "INFO"
    log_format: Literal["auto", "json", "console"] = "auto"


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How the HTTP process keeps its workers, `worker.data_parallel` of them.

    `max_jobs` bounds the jobs in flight, waiting ones included. A worker whose last sign of progress is older
    than `watchdog_seconds` is killed and restarted. `start_limit_seconds` bounds loading and warm-up. A
    restart after a death before ready waits `backoff_seconds`, doubled each time up to `max_backoff_seconds`.
    `stop_grace_seconds` is how long a worker may take to leave by itself. With `spare_worker` one more
    process that has imported its code, but loaded nothing, stands by for all workers: a restart is quicker by those
    seconds, for some hundred MB of memory. `worker_command` gets the socket's number as its last argument.
    """

    worker: WorkerConfig
    max_jobs: int = 256
    watchdog_seconds: float = 120.0
    start_limit_seconds: float = 3600.0
    backoff_seconds: float = 0.5
    max_backoff_seconds: float = 30.0
    stop_grace_seconds: float = 5.0
    spare_worker: bool = False
    worker_command: tuple[str, ...] = WORKER_COMMAND

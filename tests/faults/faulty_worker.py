"""The real worker, with faults for requests of certain seeds. Started by the engine in the place of the real one.

What goes wrong goes wrong where it would: in the third denoising step that such a request takes part in, among the
tensors of whatever else is in the batch.
"""

from __future__ import annotations

import enum
import os
import signal
import sys
import time
from collections import Counter
from typing import Any

from server.wire.config import WorkerConfig
from server.worker.loop import import_service, main

COMMAND = (sys.executable, "-P", "-m", "tests.faults.faulty_worker")
FAULTY_STEP = 3


class Fault(enum.IntEnum):
    """Seeds, and what a request with one does to its worker."""

    RAISE = 990_001
    EXHAUST_MEMORY = 990_002
    DIE = 990_003
    HANG = 990_004


def commit(fault: Fault) -> None:
    """Do it."""
    match fault:
        case Fault.RAISE:
            raise ValueError("a fault that was asked for")
        case Fault.EXHAUST_MEMORY:
            import torch

            torch.empty(2**60, dtype=torch.uint8)  # raises what the allocator raises when memory runs out
        case Fault.DIE:
            os.kill(os.getpid(), signal.SIGKILL)
        case Fault.HANG:
            time.sleep(3600)


def load(config: WorkerConfig) -> Any:
    """The real service around a denoiser that looks at the seeds first."""
    service = import_service()(config)
    denoiser: Any = service.runner.denoiser  # type: ignore[attr-defined]
    step = denoiser.step
    steps: Counter[str] = Counter()

    def faulty_step(trajectories: Any, *rest: Any, **named: Any) -> Any:
        for job in {trajectory.job.id: trajectory.job for trajectory, _ in trajectories}.values():
            if job.sampling.seed in set(Fault):
                steps[job.id] += 1
                if steps[job.id] >= FAULTY_STEP:
                    commit(Fault(job.sampling.seed))
        return step(trajectories, *rest, **named)

    denoiser.step = faulty_step
    return service


if __name__ == "__main__":
    sys.exit(main(lambda: load))

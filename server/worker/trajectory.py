"""One denoising run, on the host: what it has revealed, and where in its plan it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from server.diffusion.sampler import BoolArray, IntArray
from server.diffusion.schedule import Step, adapted, plan
from server.types import Job, StepTrace

if TYPE_CHECKING:
    from server.guidance.prefixes import RewardContext


@dataclass(slots=True)
class Trajectory:
    """Trajectory `index` of a job: response tokens (L,), which of them are still masked (L,), and the place in the
    plan. `contexts` is what each reward model reads around the response; it grows with what is settled of it."""

    job: Job
    index: int
    steps: tuple[Step, ...]
    tokens: IntArray
    masked: BoolArray
    contexts: dict[str, RewardContext]
    cursor: int = 0
    model_calls: int = 0
    reward_calls: int = 0
    last_reward: float | None = None
    trace: list[StepTrace] = field(default_factory=list)

    @classmethod
    def start(
        cls, job: Job, index: int, mask_token_id: int, contexts: dict[str, RewardContext] | None = None
    ) -> Trajectory:
        """An all-masked canvas at the first step."""
        length = job.sampling.max_tokens
        return cls(
            job,
            index,
            plan(length, job.diffusion, job.guidance),
            np.full(length, mask_token_id, dtype=np.int64),
            np.ones(length, dtype=np.bool_),
            dict(contexts or {}),
        )

    def next_step(self, *, skip_empty: bool = True) -> Step | None:
        """The next step that can reveal something, or None at the end. Steps that reveal nothing change nothing
        (the model is not told the time), so they are passed over whole: an exact saving."""
        diffusion = self.job.diffusion
        while self.cursor < len(self.steps):
            step = self.steps[self.cursor]
            can_reveal = step.reveal > 0 or diffusion.algorithm == "origin" or not skip_empty
            if self.masked[step.start : step.stop].any() and can_reveal:
                if not diffusion.adaptive:
                    return step
                return adapted(step, int(self.masked.sum()), len(self.masked), self.model_calls, self.job.guidance)
            if self.job.trace and not diffusion.adaptive:
                self.trace.append(StepTrace(step.index, step.time, int(self.masked.sum()), 0))
            self.cursor += 1
        return None

    def positions(self, step: Step) -> IntArray:
        """Response positions whose logits this step needs: all masked ones when guided, else those of the block."""
        positions = np.flatnonzero(self.masked)
        if not step.guided:
            positions = positions[(positions >= step.start) & (positions < step.stop)]
        return positions.astype(np.int64)

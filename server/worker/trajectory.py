"""One denoising run, on the host: what it has revealed, and where in its plan it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from server.diffusion.sampler import BoolArray, IntArray
from server.diffusion.schedule import Step, adapted, plan
from server.types import Job, StepTrace

if TYPE_CHECKING:
    from server.guidance.prefixes import RewardContext
    from server.models.lora import Adapter


@dataclass(slots=True)
class Trajectory:
    """Trajectory `index` of a job: response tokens (L,), which of them are still masked (L,), and the place in the
    plan. `step_map` (L,) has the step at which each was revealed (the last one, should there be several), -1 while
    it is masked. `contexts` is what each reward model reads around the response; it grows with what is settled of it.
    `adapter` is what the diffusion model runs with. `taken` counts the steps that were computed, and `reward_calls` the
    passes of reward models in them."""

    job: Job
    index: int
    steps: tuple[Step, ...]
    tokens: IntArray
    masked: BoolArray
    step_map: IntArray
    contexts: dict[str, RewardContext]
    adapter: Adapter | None = None
    cursor: int = 0
    taken: int = 0
    reward_calls: int = 0
    last_reward: float | None = None
    trace: list[StepTrace] = field(default_factory=list)

    @classmethod
    def start(
        cls,
        job: Job,
        index: int,
        mask_token_id: int,
        contexts: dict[str, RewardContext] | None = None,
        adapter: Adapter | None = None,
    ) -> Trajectory:
        """An all-masked canvas at the first step."""
        length = job.sampling.max_tokens
        return cls(
            job,
            index,
            plan(length, job.diffusion, job.guidance),
            np.full(length, mask_token_id, dtype=np.int64),
            np.ones(length, dtype=np.bool_),
            np.full(length, -1, dtype=np.int64),
            dict(contexts or {}),
            adapter,
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
                return adapted(step, int(self.masked.sum()), len(self.masked), self.taken, self.job.guidance)
            if self.job.trace and not diffusion.adaptive:
                self.trace.append(StepTrace(step.index, step.time, int(self.masked.sum()), 0))
            self.cursor += 1
        return None

    def final(self, stop_token_ids: Sequence[int]) -> bool:
        """Whether all that is asked of it is there though positions are masked: the text, which ends at the first of
        these tokens, is revealed up to that one. It never changes again, so neither do its reward and its counts."""
        if self.job.shows_canvas:
            return False
        return bool(np.isin(self.tokens[: self.masked.argmax()], stop_token_ids).any())

    def readers(self, step: Step) -> tuple[str, ...]:
        """Names of the reward models that read the canvas in this step: to steer it, or for the trace."""
        if not (step.guided or self.job.trace):
            return ()
        return tuple(sorted(weighted.model for weighted in self.job.guidance.reward_models))

    def positions(self, step: Step) -> IntArray:
        """Response positions whose logits this step needs: all masked ones if the canvas is read, else the block's."""
        positions = np.flatnonzero(self.masked)
        if not self.readers(step):
            positions = positions[(positions >= step.start) & (positions < step.stop)]
        return positions.astype(np.int64)

"""One denoising run, on the host: what it has revealed, and where in its plan it is."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from server.diffusion.sampler import BoolArray, IntArray
from server.diffusion.schedule import Step, adapted, plan
from server.types import Job, ModelInfo, StepTrace

if TYPE_CHECKING:
    from server.guidance.prefixes import RewardContext
    from server.models.lora import Adapter
    from server.models.packing import Prefix


@dataclass(slots=True)
class Trajectory:
    """Trajectory `index` of a job: response tokens (L,), which of them are still masked (L,), and the place in the
    plan. `step_map` (L,) has the step at which each was revealed (the last one, should there be several), -1 while
    it is masked. `contexts` is what each reward model reads around the response; it grows with what is settled of it.
    `adapter` is what the diffusion model runs with. `taken` counts the steps that were computed, and `reward_calls` the
    passes of reward models in them. `log_probability` is the total of the tokens that it has revealed, where it is
    resampled by that; where by rewards, `estimate` is the response before a meeting, as far as it is there, with the
    best guess where it is masked. `ancestor` is the trajectory whose copy has gone on here, None before any has.

    With block-causal attention `prefix` holds the diffusion model's keys and values of whole blocks of the prompt and
    of the response, and grows with each that is finished; the last block may reach past the L tokens of the answer,
    which is over at the end of the block in which the text ends: `length` tokens.
    """

    job: Job
    index: int
    steps: tuple[Step, ...]
    tokens: IntArray
    masked: BoolArray
    step_map: IntArray
    contexts: dict[str, RewardContext]
    prefix: Prefix | None
    adapter: Adapter | None
    stop_token_ids: tuple[int, ...]
    length: int
    cursor: int = 0
    taken: int = 0
    reward_calls: int = 0
    last_reward: float | None = None
    log_probability: float = 0.0
    estimate: IntArray | None = None
    ancestor: int | None = None
    trace: list[StepTrace] = field(default_factory=list)

    @classmethod
    def start(
        cls,
        job: Job,
        index: int,
        info: ModelInfo,
        contexts: dict[str, RewardContext] | None = None,
        prefix: Prefix | None = None,
        adapter: Adapter | None = None,
    ) -> Trajectory:
        """An all-masked canvas at the first step."""
        length = job.sampling.max_tokens
        steps = plan(length, job.diffusion, job.guidance, job.lead)
        return cls(
            job,
            index,
            steps,
            np.full(steps[-1].stop, info.mask_token_id, dtype=np.int64),
            np.ones(steps[-1].stop, dtype=np.bool_),
            np.full(steps[-1].stop, -1, dtype=np.int64),
            dict(contexts or {}),
            prefix,
            adapter,
            () if job.sampling.ignore_eos else info.stop_token_ids,
            length,
        )

    def child(self, index: int) -> Trajectory:
        """A copy that goes on in another's place. What is cached is shared: it never changes."""
        return replace(
            self,
            index=index,
            tokens=self.tokens.copy(),
            masked=self.masked.copy(),
            step_map=self.step_map.copy(),
            contexts=dict(self.contexts),
            trace=list(self.trace),
            ancestor=self.index,
        )

    def next_step(self, *, skip_empty: bool = True) -> Step | None:
        """The next step that can reveal something, or None at the end. Steps that reveal nothing change nothing
        (the model is not told the time), so they are passed over whole: an exact saving. (Where trajectories meet after
        so many steps they always are, for these do not count.)"""
        diffusion = self.job.diffusion
        while self.cursor < len(self.steps):
            step = self.steps[self.cursor]
            if diffusion.block_causal and self._stops_within(step.start):
                self.cursor, self.length = len(self.steps), step.start
                return None
            skips = skip_empty or self.job.guidance.resample is not None
            can_reveal = step.reveal > 0 or diffusion.algorithm == "origin" or not skips
            if self.masked[step.start : step.stop].any() and can_reveal:
                if not diffusion.adaptive:
                    return step
                return adapted(step, self.left, self.length, self.taken, self.job.guidance)
            if self.job.trace and not diffusion.adaptive:
                self.trace.append(StepTrace(step.index, step.time, self.left, 0))
            self.cursor += 1
        return None

    @property
    def left(self) -> int:
        """How many of the answer's positions are masked."""
        return int(self.masked[: self.length].sum())

    @property
    def shown(self) -> list[int]:
        """The answer's tokens, -1 where they are masked."""
        shown: list[int] = np.where(self.masked, -1, self.tokens)[: self.length].tolist()
        return shown

    def stop(self, step: Step) -> int:
        """Where the canvas of a step ends among the response positions: later blocks are not there yet when attention
        is block-causal."""
        return step.stop if self.job.diffusion.block_causal else len(self.tokens)

    @property
    def final(self) -> bool:
        """Whether all that is asked of it is there though positions are masked: the text, which ends at the first
        stop token, is revealed up to that one. It never changes again, so neither do its reward and its counts."""
        if self.job.shows_canvas:
            return False
        return self._stops_within(int(self.masked.argmax()))

    def _stops_within(self, count: int) -> bool:
        return not set(self.stop_token_ids).isdisjoint(self.tokens[:count].tolist())

    @property
    def settled(self) -> tuple[int, ...]:
        """With block-causal attention, the tokens of all whole blocks before the one of its next step; the prompt's
        included."""
        start = self.steps[self.cursor].start if self.cursor < len(self.steps) else 0
        tokens = (*self.job.prompt_ids, *self.tokens[:start].tolist())
        return tokens if start else tokens[: len(tokens) - self.job.lead]

    @property
    def guesses(self) -> bool:
        """Whether its next step, if it is not the last one, guesses all that is masked: the trajectories meet after it,
        for rewards."""
        rule, last = self.job.guidance.resample, self.cursor + 1 == len(self.steps)
        return rule is not None and rule.by == "reward" and not last and (self.taken + 1) % rule.every == 0

    def readers(self, step: Step) -> tuple[str, ...]:
        """Names of the reward models that read the canvas in this step: to steer it, or for the trace."""
        if not (step.guided or self.job.trace):
            return ()
        return tuple(sorted(weighted.model for weighted in self.job.guidance.reward_models))

    def positions(self, step: Step) -> IntArray:
        """Response positions whose logits this step needs: all masked ones if the canvas is read or all of it is
        guessed, else the block's."""
        positions = np.flatnonzero(self.masked[: self.stop(step)])
        if not (self.readers(step) or self.guesses):
            positions = positions[(positions >= step.start) & (positions < step.stop)]
        return positions.astype(np.int64)

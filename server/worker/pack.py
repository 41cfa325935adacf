"""The only place that packs: trajectories in, one ragged forward and its rows out.

A trajectory's state lives on the host as a few small numpy arrays: one denoising step reads results back once, so the
next step's inputs can be built here without asking the device anything.
Equal canvases share one forward: the K trajectories of a prompt at their first step, or identical prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.transfer import upload
from server.diffusion.schedule import Step, adapted, plan
from server.guidance.prefixes import RewardContext
from server.models.packing import PackedLayout
from server.types import Job, StepTrace

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.floating]


@dataclass(slots=True)
class Trajectory:
    """One denoising run: response tokens (L,), which of them are still masked (L,), and the place in the plan."""

    job: Job
    index: int
    steps: tuple[Step, ...]
    tokens: IntArray
    masked: BoolArray
    cursor: int = 0
    model_calls: int = 0
    reward_calls: int = 0
    last_reward: float | None = None
    trace: list[StepTrace] = field(default_factory=list)
    reward_contexts: dict[str, RewardContext] = field(default_factory=dict)  # by reward model, as far as it is settled

    @classmethod
    def start(cls, job: Job, index: int, mask_token_id: int) -> Trajectory:
        """An all-masked canvas at the first step."""
        length = job.sampling.max_tokens
        return cls(
            job,
            index,
            plan(length, job.diffusion, job.guidance),
            np.full(length, mask_token_id, dtype=np.int64),
            np.ones(length, dtype=np.bool_),
        )

    def next_step(self, *, skip_empty: bool = True) -> Step | None:
        """The next step that can reveal something, or None at the end. Steps that reveal nothing change nothing
        (the model is not told the time), so they are passed over whole: an exact saving."""
        while self.cursor < len(self.steps):
            step = self.steps[self.cursor]
            can_reveal = step.reveal > 0 or self.job.diffusion.algorithm == "origin" or not skip_empty
            if self.masked[step.start : step.stop].any() and can_reveal:
                return self._as_met(step)
            if self.job.trace and not self.job.diffusion.adaptive:
                self.trace.append(StepTrace(step.index, step.time, int(self.masked.sum()), 0))
            self.cursor += 1
        return None

    def _as_met(self, step: Step) -> Step:
        if not self.job.diffusion.adaptive:
            return step
        return adapted(step, int(self.masked.sum()), len(self.masked), self.model_calls, self.job.guidance)

    def positions(self, step: Step) -> IntArray:
        """Response positions whose logits this step needs: all masked ones when guided, else those of the block."""
        positions = np.flatnonzero(self.masked)
        if not step.guided:
            positions = positions[(positions >= step.start) & (positions < step.stop)]
        return positions.astype(np.int64)


@dataclass(frozen=True, slots=True)
class Member:
    """A trajectory in a batch: its step, its rows' response positions (n,), and those rows' places (n,) among the
    batch's logits rows."""

    trajectory: Trajectory
    step: Step
    positions: IntArray
    rows: IntArray


@dataclass(frozen=True, slots=True)
class Batch:
    """One packed forward: tokens (S,), layout, and the packed indices `rows` (U + C,) whose logits are wanted: U rows
    of distinct canvases, then the C rows of the same positions with a blind prompt (classifier-free guidance).

    `blind` (U,) is where among them each row's blind twin is, -1 without one; `cfg_scale` (U,) is 0 there.
    """

    members: tuple[Member, ...]
    tokens: Tensor
    layout: PackedLayout
    rows: Tensor
    count: int
    blind: IntArray
    cfg_scale: FloatArray


@dataclass(slots=True)
class _Canvas:
    tokens: IntArray
    blind: IntArray | None
    rows: IntArray  # canvas indices of the wanted rows
    cfg_scale: float
    first_row: int = 0


def pack(
    trajectories: Sequence[tuple[Trajectory, Step]],
    mask_token_id: int,
    device: torch.device,
    *,
    share_equal: bool = True,
) -> Batch:
    """Pack the next step of each trajectory. Sequences are ordered by length, so that equal lengths are neighbours."""
    canvases: dict[tuple[object, ...], _Canvas] = {}
    keys = []
    wanted = []
    for trajectory, step in trajectories:
        job = trajectory.job
        positions = trajectory.positions(step)
        key = (
            job.prompt_ids, job.suffix_ids, trajectory.tokens.tobytes(), positions.tobytes(), job.diffusion.cfg_scale,
            None if share_equal else (job.id, trajectory.index),
        )  # fmt: skip
        if key not in canvases:
            canvases[key] = _canvas(trajectory, positions, mask_token_id)
        keys.append(key)
        wanted.append(positions)

    ordered = sorted(canvases.values(), key=lambda canvas: len(canvas.tokens))
    sequences: list[tuple[IntArray, IntArray]] = []  # (tokens, wanted rows), blind ones after all others
    count = 0
    for canvas in ordered:
        canvas.first_row = count
        count += len(canvas.rows)
        sequences.append((canvas.tokens, canvas.rows))
    with_cfg = [canvas for canvas in ordered if canvas.blind is not None]
    sequences += [(canvas.blind, canvas.rows) for canvas in ordered if canvas.blind is not None]

    lengths = [len(tokens) for tokens, _ in sequences]
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    rows = np.concatenate([start + wanted_ for start, (_, wanted_) in zip(starts, sequences, strict=True)])
    members = tuple(
        Member(trajectory, step, positions, canvases[key].first_row + np.arange(len(positions)))
        for (trajectory, step), positions, key in zip(trajectories, wanted, keys, strict=True)
    )
    blind = np.full(count, -1, dtype=np.int64)
    next_blind = count
    for canvas in with_cfg:
        blind[canvas.first_row : canvas.first_row + len(canvas.rows)] = next_blind + np.arange(len(canvas.rows))
        next_blind += len(canvas.rows)
    return Batch(
        members=members,
        tokens=upload(torch.from_numpy(np.concatenate([tokens for tokens, _ in sequences])), device),
        layout=PackedLayout.of(tuple(lengths), device),
        rows=upload(torch.from_numpy(rows.astype(np.int64)), device),
        count=count,
        blind=blind,
        cfg_scale=np.concatenate([np.full(len(canvas.rows), canvas.cfg_scale) for canvas in ordered]),
    )


def _canvas(trajectory: Trajectory, positions: IntArray, mask_token_id: int) -> _Canvas:
    job = trajectory.job
    prompt = np.asarray(job.prompt_ids, dtype=np.int64)
    suffix = np.asarray(job.suffix_ids, dtype=np.int64)
    blind = None
    if job.diffusion.cfg_scale:
        blind = np.concatenate(
            [np.full_like(prompt, mask_token_id), trajectory.tokens, np.full_like(suffix, mask_token_id)]
        )
    canvas = np.concatenate([prompt, trajectory.tokens, suffix])
    return _Canvas(canvas, blind, positions + len(prompt), job.diffusion.cfg_scale)

"""Members of a batch that share one kernel state, and their rows' parameters as tensors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import kernels
from kernels.random import INNER_ORIGIN, INNER_RANK, row_keys, uniform
from kernels.transfer import upload
from server.guidance.assembly import Responses
from server.types import ModelInfo
from server.worker.pack import Batch, Member
from server.worker.trajectory import IntArray


@dataclass(frozen=True, slots=True)
class Group:
    """Unguided members, or those with the same reward models, by M, the largest first. Their N rows come one member
    after another."""

    members: tuple[Member, ...]
    rewards: tuple[str, ...]
    device: torch.device

    @property
    def count(self) -> int:
        """N."""
        return sum(len(member.rows) for member in self.members)

    @property
    def gradient_steps(self) -> int:
        """The largest M of its members; 0 when unguided."""
        return self.members[0].gradient_steps

    def of(self, members: Sequence[Member]) -> Group:
        """Some of its members, in their order."""
        return replace(self, members=tuple(members))

    def by_gradient_steps(self) -> list[Group]:
        """One group for each M of its members, the largest first."""
        parts = itertools.groupby(self.members, key=lambda member: member.gradient_steps)
        return [self.of(tuple(members)) for _, members in parts]

    def rows(self) -> IntArray:
        """Places of the group's rows among the batch's logits, (N,)."""
        return np.concatenate([member.rows for member in self.members])

    def repeat(self, values: Sequence[float | int | bool]) -> npt.NDArray[np.generic]:
        """One value a member -> one a row, (N,)."""
        return np.repeat(np.asarray(values), [len(member.rows) for member in self.members])

    def column(self, values: Sequence[float | int | bool], dtype: torch.dtype | None = None) -> Tensor:
        """One value a member -> one a row, (N,), on the device."""
        return upload(torch.from_numpy(self.repeat(values)), self.device, dtype)

    def candidates(self) -> IntArray | None:
        """Indices among the group's rows that this step may reveal, or None for all (no blocks)."""
        starts = np.cumsum([0, *(len(member.rows) for member in self.members)])
        chosen = np.concatenate([s + member.candidates for s, member in zip(starts, self.members, strict=False)])
        return None if len(chosen) == starts[-1] else chosen

    def row_params(self, logits: Tensor) -> kernels.RowParams:
        """Per-row parameters (N,); temperature 0 is argmax with softmax temperature 1."""
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        sampling = [member.trajectory.job.sampling for member in self.members]
        vocab_size = logits.shape[-1]
        return kernels.RowParams(
            tau=self.column([s.temperature or 1.0 for s in sampling], dtype),
            top_p=self.column([s.top_p for s in sampling], dtype),
            top_k=self.column([min(s.top_k or vocab_size, vocab_size) for s in sampling], torch.long),
            greedy=self.column([s.temperature == 0 for s in sampling], torch.bool),
            eta=self.column([member.trajectory.job.guidance.eta for member in self.members], dtype),
        )

    def keys(self, inner: int, subset: IntArray | None = None) -> Tensor:
        """Random keys (n, 4) of the group's rows, or of some of them."""
        jobs = [member.trajectory.job for member in self.members]
        positions = np.concatenate([member.positions for member in self.members])
        columns = [
            self.repeat([job.sampling.seed for job in jobs]),
            self.repeat([job.prompt_index for job in jobs]),
            self.repeat([member.trajectory.index for member in self.members]),
            self.repeat([member.step.index for member in self.members]),
            np.full(len(positions), inner),
            positions,
        ]
        if subset is not None:
            columns = [column[subset] for column in columns]
        return row_keys(*(upload(torch.from_numpy(column.astype(np.int64)), self.device) for column in columns))

    def ranking_uniforms(self, candidates: IntArray | None) -> Tensor | None:
        """Uniforms (n,) for `origin` and `algorithm_temperature`, where any member needs them."""
        diffusion = [member.trajectory.job.diffusion for member in self.members]
        if not any(d.algorithm == "origin" or d.algorithm_temperature for d in diffusion):
            return None
        is_origin = self.repeat([d.algorithm == "origin" for d in diffusion])
        is_origin = is_origin if candidates is None else is_origin[candidates]
        return torch.where(
            upload(torch.from_numpy(is_origin), self.device),
            uniform(self.keys(INNER_ORIGIN, candidates), 0),
            uniform(self.keys(INNER_RANK, candidates), 0),
        )

    def responses(self, info: ModelInfo) -> Responses:
        """The members' canvases as the steering loop takes them."""
        return Responses.of(
            [member.trajectory.tokens for member in self.members],
            [member.positions for member in self.members],
            self.device,
            eos_token_id=info.eos_token_id,
            pad_token_id=info.pad_token_id,
        )


def groups(batch: Batch, device: torch.device, *, share_inner_steps: bool = True) -> Iterator[Group]:
    """Members by reward models, or by reward models and M; the unguided ones are one group."""
    split: dict[tuple[tuple[str, ...], int], list[Member]] = {}
    for member in batch.members:
        names: tuple[str, ...] = ()
        if member.step.guided:
            names = tuple(sorted(weighted.model for weighted in member.trajectory.job.guidance.reward_models))
        split.setdefault((names, 0 if share_inner_steps else member.gradient_steps), []).append(member)
    for (rewards, _), members in split.items():
        yield Group(tuple(sorted(members, key=lambda member: -member.gradient_steps)), rewards, device)

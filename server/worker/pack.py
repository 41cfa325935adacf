"""The only place that packs: trajectories in, one ragged forward and its rows out, and those in groups of members that
share one kernel state.

With block-causal attention a canvas is what lies behind the cached prefix: the current block, in its first step after
the block before, which passes once more with its final tokens and is kept.

A trajectory's state lives on the host as a few small numpy arrays: one denoising step reads results back once, so the
next step's inputs can be built here without asking the device anything.
Equal canvases share one forward: the K trajectories of a prompt at their first step, or identical prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import kernels
from kernels.random import INNER_FINAL, INNER_ORIGIN, INNER_RANK, at_inner, row_keys, uniform
from kernels.transfer import upload, upload_all
from server.diffusion.sampler import FloatArray, IntArray
from server.diffusion.schedule import Step, block_lengths
from server.models.lora import Adapter
from server.models.packing import EMPTY_PREFIX, Kept, PackedLayout, Prefix, grown, places
from server.worker.trajectory import Trajectory


@dataclass(frozen=True, slots=True)
class Member:
    """A trajectory in a batch: its step, its rows' response positions (n,), and those rows' places (n,) among the
    batch's logits rows."""

    trajectory: Trajectory
    step: Step
    positions: IntArray
    rows: IntArray

    @property
    def rewards(self) -> tuple[str, ...]:
        """Names of the reward models that read its canvas in this step."""
        return self.trajectory.readers(self.step)

    @property
    def candidates(self) -> IntArray:
        """Which of its rows (n,) this step may reveal: those of the block."""
        inside = (self.positions >= self.step.start) & (self.positions < self.step.stop)
        return np.flatnonzero(inside).astype(np.int64)

    @property
    def response(self) -> IntArray:
        """The response tokens that are there in this step."""
        return self.trajectory.tokens[: self.trajectory.stop(self.step)]


@dataclass(frozen=True, slots=True)
class Batch:
    """One packed forward: tokens (S,), layout, and the packed indices `rows` (U + C,) whose logits are wanted: U rows
    of distinct canvases, then the C rows of the same positions with a blind prompt (classifier-free guidance).

    `blind` (U,) is where among them each row's blind twin is, -1 without one; `cfg_scale` (U,) is 0 there. What is to
    be `kept` of it are the finished blocks of trajectories, `finished` by canvas with their lengths.
    """

    members: tuple[Member, ...]
    tokens: Tensor
    layout: PackedLayout
    rows: Tensor
    blind: IntArray
    cfg_scale: FloatArray
    kept: Kept | None
    finished: tuple[tuple[int, tuple[Trajectory, ...]], ...]

    def grow(self) -> None:
        """After the forward: what was kept follows the cached prefixes of its trajectories."""
        if self.kept is None:
            return
        prefixes = [owners[0].prefix or EMPTY_PREFIX for _, owners in self.finished]
        longer = grown(prefixes, [length for length, _ in self.finished], self.kept.captured)
        for (_, owners), prefix in zip(self.finished, longer, strict=True):
            for trajectory in owners:
                trajectory.prefix = prefix


@dataclass(frozen=True, slots=True)
class Forward:
    """A batch that has been through the diffusion model. Of it `states` (U + C, d) are kept, which `head` turns into
    logits, V / d times as large, for as many rows at a time as memory takes."""

    batch: Batch
    states: Tensor
    head: Callable[[Tensor], Tensor]

    def wanted(self, members: Sequence[Member]) -> Wanted:
        """Which rows these members take, on the host; they may share some."""
        rows, blind = np.concatenate([member.rows for member in members]), self.batch.blind
        places = None
        if len({member.rows[:1].tobytes() for member in members}) < len(members):
            rows, inverse = np.unique(rows, return_inverse=True)
            places = torch.from_numpy(inverse)
        twins = np.flatnonzero(blind[rows] >= 0)
        whole = np.concatenate([rows, blind[rows[twins]]]) if len(twins) else rows
        every = len(whole) == len(self.states) and bool((whole == np.arange(len(whole))).all())
        return Wanted(
            None if every else torch.from_numpy(whole),
            torch.from_numpy(twins) if len(twins) else None,
            torch.from_numpy(self.batch.cfg_scale[rows[twins]]) if len(twins) else None,
            places,
        )

    def logits(self, wanted: Wanted) -> Tensor:
        """phi_0 (N, V) of the rows that some members want; with classifier-free guidance applied, u + (c + 1) (l - u).
        What is wanted is on the device."""
        logits = self.head(self.states if wanted.rows is None else self.states[wanted.rows])
        if wanted.twins is not None and wanted.scale is not None:
            count = len(logits) - len(wanted.twins)
            without, scale = logits[count:], wanted.scale.to(logits.dtype)[:, None]
            guided = logits[wanted.twins].sub_(without).mul_(scale.add(1.0)).add_(without)
            logits = logits[:count].index_copy_(0, wanted.twins, guided)
        return logits if wanted.places is None else logits[wanted.places]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Of a forward's rows: which are wanted and after them their blind `twins`, (n + t,), None for all as they lie;
    which of the n have one, (t,), and the `scale` of its guidance; and what row each of N takes of the n, where some
    are shared."""

    rows: Tensor | None
    twins: Tensor | None
    scale: Tensor | None
    places: Tensor | None


@dataclass(slots=True)
class _Canvas:
    """Tokens (S',) of one sequence, after its cached `prefix`; the same with a blind prompt for classifier-free
    guidance, and the indices (n,) of the wanted rows. They are one piece, or with block-causal attention the lengths of
    their `blocks`. `first_row` is the place of the first of the rows in the batch, `owners` the trajectories that share
    it, `adapter` what all of it runs with.
    """

    tokens: IntArray
    blind: IntArray | None
    rows: IntArray
    cfg_scale: float
    adapter: Adapter | None
    blocks: tuple[int, ...]
    prefix: Prefix
    owners: list[Trajectory]
    first_row: int = 0

    @classmethod
    def of(cls, trajectory: Trajectory, step: Step, positions: IntArray, mask_token_id: int) -> _Canvas:
        job, tokens, blind = trajectory.job, trajectory.tokens[: trajectory.stop(step)], None
        prompt, suffix = (np.asarray(ids, dtype=np.int64) for ids in (job.prompt_ids, job.suffix_ids))
        if job.diffusion.cfg_scale:
            blind = np.concatenate([np.full_like(prompt, mask_token_id), tokens, np.full_like(suffix, mask_token_id)])
        prefix = trajectory.prefix or EMPTY_PREFIX
        canvas = np.concatenate([prompt, tokens, suffix])[prefix.length :]
        blocks: tuple[int, ...] = (len(canvas),)
        if job.diffusion.block_causal:
            blocks = block_lengths(len(canvas), len(prompt) - job.lead - prefix.length, job.diffusion.block_length or 1)
        rows = positions + len(prompt) - prefix.length
        return cls(canvas, blind, rows, job.diffusion.cfg_scale, trajectory.adapter, blocks, prefix, [])


def pack(
    trajectories: Sequence[tuple[Trajectory, Step]],
    mask_token_id: int,
    device: torch.device,
    *,
    share_equal: bool = True,
    keep_blocks: bool = True,
) -> Batch:
    """Pack the next step of each trajectory. Sequences are ordered by adapter, so that its rows are neighbours, then by
    length, so that equal ones are."""
    canvases: dict[tuple[object, ...], _Canvas] = {}
    placed: list[tuple[IntArray, _Canvas]] = []
    for trajectory, step in trajectories:
        job, positions = trajectory.job, trajectory.positions(step)
        key: tuple[object, ...] = (job.id, trajectory.index)
        if share_equal:
            block: tuple[object, ...] = ()
            if job.diffusion.block_causal:
                block = step.start, step.stop, job.diffusion.block_length, id(trajectory.prefix)
            canvas = trajectory.tokens.tobytes(), positions.tobytes()
            key = (job.prompt_ids, job.suffix_ids, *canvas, job.diffusion.cfg_scale, job.adapter, *block)
        if key not in canvases:
            canvases[key] = _Canvas.of(trajectory, step, positions, mask_token_id)
        canvases[key].owners.append(trajectory)
        placed.append((positions, canvases[key]))

    place = {id(trajectory.adapter): index for index, (trajectory, _) in enumerate(trajectories)}
    ordered = sorted(canvases.values(), key=lambda canvas: (place[id(canvas.adapter)], len(canvas.tokens)))
    count = 0
    for each in ordered:
        each.first_row = count
        count += len(each.rows)
    sequences = [(each.tokens, each.rows, each) for each in ordered]
    blind = np.full(count, -1, dtype=np.int64)
    next_blind = count
    for each in ordered:
        if each.blind is not None:
            sequences.append((each.blind, each.rows, each))
            blind[each.first_row : each.first_row + len(each.rows)] = next_blind + np.arange(len(each.rows))
            next_blind += len(each.rows)

    starts = places([len(tokens) for tokens, _, _ in sequences])
    wanted = np.concatenate([start + rows for start, (_, rows, _) in zip(starts, sequences, strict=True)])
    finished, kept = [], []
    for start, each in zip(starts, ordered, strict=False):
        if keep_blocks and each.blocks[:-1]:
            length = sum(each.blocks[:-1])
            finished.append((length, tuple(each.owners)))
            kept.append(start + np.arange(length))
    layout = PackedLayout.of(
        [length for *_, each in sequences for length in each.blocks],
        prefixes=[each.prefix for *_, each in sequences for _ in each.blocks],
        before=[place for *_, each in sequences for place in places(each.blocks)],
        adapters=[each.adapter for *_, each in sequences for _ in each.blocks],
    )
    packed = torch.from_numpy(np.concatenate([tokens for tokens, _, _ in sequences]))
    passing = Kept(torch.from_numpy(np.concatenate(kept))) if kept else None
    packed, rows, layout, passing = upload_all([packed, torch.from_numpy(wanted), layout, passing], device)
    return Batch(
        members=tuple(
            Member(trajectory, step, positions, canvas.first_row + np.arange(len(positions)))
            for (trajectory, step), (positions, canvas) in zip(trajectories, placed, strict=True)
        ),
        tokens=packed,
        layout=layout,
        rows=rows,
        blind=blind,
        cfg_scale=np.concatenate([np.full(len(each.rows), each.cfg_scale) for each in ordered]),
        kept=passing,
        finished=tuple(finished),
    )


@dataclass(frozen=True, slots=True)
class Group:
    """Members that no reward model reads, or those that the same ones do, by M, the largest first. Their N rows come
    one member after another."""

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
        return self.members[0].step.gradient_steps

    def of(self, members: Sequence[Member]) -> Group:
        """Some of its members, in their order."""
        return replace(self, members=tuple(members))

    def repeat(self, values: Sequence[float | int | bool]) -> npt.NDArray[np.generic]:
        """One value a member -> one a row, (N,)."""
        return np.array(values).repeat([len(member.rows) for member in self.members])

    def column(self, values: Sequence[float | int | bool]) -> Tensor:
        """One value a member -> one a row, (N,), on the device."""
        return upload(torch.from_numpy(self.repeat(values)), self.device)

    def candidates(self) -> IntArray | None:
        """Indices among the group's rows that this step may reveal, or None for all (no blocks)."""
        starts = np.cumsum([0, *(len(member.rows) for member in self.members)])
        chosen = np.concatenate([s + member.candidates for s, member in zip(starts, self.members, strict=False)])
        return None if len(chosen) == starts[-1] else chosen

    def row_params(self, logits: Tensor) -> kernels.RowParams:
        """Per-row parameters (N,) of logits (N, V), on the host; temperature 0 is argmax with softmax temperature 1."""
        sampling = [member.trajectory.job.sampling for member in self.members]
        etas = [member.trajectory.job.guidance.eta for member in self.members]
        vocab_size, exact = logits.shape[1], torch.float64 if logits.dtype == torch.float64 else torch.float32
        return kernels.RowParams(
            tau=torch.from_numpy(self.repeat([s.temperature or 1.0 for s in sampling])).to(exact),
            top_p=torch.from_numpy(self.repeat([s.top_p for s in sampling])).to(exact),
            top_k=torch.from_numpy(self.repeat([min(s.top_k or vocab_size, vocab_size) for s in sampling])),
            greedy=torch.from_numpy(self.repeat([s.temperature == 0 for s in sampling])),
            eta=torch.from_numpy(self.repeat(etas)).to(exact),
        )

    def keys(self) -> Tensor:
        """Random keys (M + 2, N, 4) of its rows, on the host: at each inner step, after them, and of the final draw."""
        who = [
            (m.trajectory.job.sampling.seed, m.trajectory.job.prompt_index, m.trajectory.index, m.step.index, 0)
            for m in self.members
        ]
        columns = torch.from_numpy(np.array(who).T.repeat([len(member.rows) for member in self.members], axis=1))
        seed, prompt, trajectory, step, inner = columns.unbind(0)
        positions = torch.from_numpy(np.concatenate([member.positions for member in self.members]))
        first = row_keys(seed, prompt, trajectory, step, inner, positions)
        return torch.stack([at_inner(first, when) for when in (*range(self.gradient_steps + 1), INNER_FINAL)])

    def ranking_uniforms(self, keys: Tensor, subset: Tensor | None) -> Tensor | None:
        """Uniforms (n,) for `origin` and `algorithm_temperature`, where any member needs them: of its rows with the
        `keys` (N, 4), of any inner step, or of some of them."""
        diffusion = [member.trajectory.job.diffusion for member in self.members]
        if not any(d.algorithm == "origin" or d.algorithm_temperature for d in diffusion):
            return None
        inner = self.column([INNER_ORIGIN if d.algorithm == "origin" else INNER_RANK for d in diffusion])
        keys = at_inner(keys, inner)
        return uniform(keys if subset is None else keys[subset], 0)


def groups(batch: Batch, device: torch.device, *, share_inner_steps: bool = True) -> Iterator[Group]:
    """Members by the reward models that read them, or by these and M; those that none does are one group."""
    split: dict[tuple[tuple[str, ...], int], list[Member]] = {}
    for member in batch.members:
        split.setdefault((member.rewards, 0 if share_inner_steps else member.step.gradient_steps), []).append(member)
    for (rewards, _), members in split.items():
        yield Group(tuple(sorted(members, key=lambda member: -member.step.gradient_steps)), rewards, device)

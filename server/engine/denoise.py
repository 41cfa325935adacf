"""One denoising step for a batch of trajectories: forward, steer, draw, rank, reveal. No queues here.

The device is read once a step: confidences, drawn tokens and rewards come back together, and the ranking of each
trajectory's few dozen positions happens on the host.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import kernels
from kernels.random import INNER_FINAL, INNER_ORIGIN, INNER_RANK, row_keys, uniform
from server.diffusion.sampler import reveal_independently, reveal_most_confident
from server.diffusion.schedule import Step
from server.engine.batch import Batch, Member, Trajectory, pack
from server.engine.stats import RunnerStats
from server.guidance.steer import Objective, Responses, RewardContext, Steered, Timings, steer
from server.models.base import DiffusionModel
from server.rewards.reward_model import RewardModel
from server.types import ModelInfo, StepTrace

Contexts = Mapping[str, Mapping[str, RewardContext]]  # job id -> reward model's name -> context
FloatArray = npt.NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class Revealed:
    """What a step did to one trajectory: (response position, token id) pairs; entropies (L entries, None where
    revealed) when the job streams its canvas; `broken` when the numbers were not finite."""

    trajectory: Trajectory
    step: Step
    tokens: list[tuple[int, int]]
    entropy: list[float | None] | None
    broken: bool = False


@dataclass(frozen=True, slots=True)
class _Group:
    """Members that share a kernel state: unguided ones, or those with the same reward models and M."""

    members: tuple[Member, ...]
    rewards: tuple[str, ...]
    gradient_steps: int

    @property
    def guided(self) -> bool:
        return bool(self.rewards)

    def rows(self) -> npt.NDArray[np.int64]:
        """Places of the group's rows among the batch's logits, (N,)."""
        return np.concatenate([member.rows for member in self.members])

    def repeat(self, values: Sequence[float | int | bool]) -> npt.NDArray[np.generic]:
        """One value a member -> one a row, (N,)."""
        return np.repeat(np.asarray(values), [len(member.rows) for member in self.members])


class Denoiser:
    """Runs denoising steps with one diffusion model."""

    def __init__(self, model: DiffusionModel, info: ModelInfo) -> None:
        self.model, self.info = model, info
        self.device = model.device
        self.stats = RunnerStats()

    @torch.no_grad()
    def step(
        self,
        trajectories: Sequence[tuple[Trajectory, Step]],
        contexts: Contexts,
        reward_models: Mapping[str, RewardModel],
    ) -> list[Revealed]:
        """One step of every given trajectory, which are changed in place."""
        started = time.perf_counter()
        batch = pack(trajectories, self.info.mask_token_id, self.device)
        logits = self._logits(batch)
        forwarded = time.perf_counter()
        self.stats.model_forward_seconds.add(forwarded - started)
        self.stats.batch_trajectories.add(len(batch.members))
        self.stats.batch_rows.add(batch.count)
        revealed: list[Revealed] = []
        for group in _groups(batch):
            revealed += self._group_step(group, logits, contexts, reward_models)
        self.stats.denoising_steps += len(batch.members)
        self.stats.committed_tokens += sum(len(entry.tokens) for entry in revealed)
        return revealed

    def _logits(self, batch: Batch) -> Tensor:
        """phi_0 (U, V) of the batch's distinct rows, with classifier-free guidance applied."""
        logits = self.model.masked_logits(batch.tokens, batch.layout, batch.rows)
        if batch.cfg_rows is None or batch.cfg_scale is None:
            return logits
        conditional, blind = logits[: batch.count], logits[batch.count :]
        scale = batch.cfg_scale.to(logits.dtype)[:, None]
        mixed = blind + (scale + 1.0) * (conditional[batch.cfg_rows] - blind)
        return conditional.index_copy(0, batch.cfg_rows, mixed)

    def _group_step(
        self, group: _Group, logits: Tensor, contexts: Contexts, reward_models: Mapping[str, RewardModel]
    ) -> list[Revealed]:
        rows = group.rows()
        whole = len(rows) == len(logits) and bool((rows == np.arange(len(rows))).all())
        phi_0 = logits if whole else logits[torch.from_numpy(rows).to(self.device)]
        state = kernels.begin(phi_0, self._row_params(group, phi_0))
        base_stats = state.stats  # of the unguided, unfiltered distribution
        base_entropy, traced_entropy = base_stats.entropy_tau, base_stats.entropy_1
        steered = Steered()
        if group.guided:
            started = time.perf_counter()
            steered = self._steer(group, state, contexts, reward_models)
            self.stats.guidance_seconds.add(time.perf_counter() - started)

        candidates = self._candidates(group)
        subset = None if candidates is None else torch.from_numpy(candidates).to(self.device)
        tokens = kernels.draw(state, self._keys(group, INNER_FINAL, candidates), rows=subset)
        confidence = self._confidence(group, state, base_entropy, tokens, subset)
        uniforms = self._ranking_uniforms(group, candidates)

        # The step's one read of the device.
        return self._commit(
            group,
            candidates,
            tokens.cpu().numpy(),
            confidence.cpu().numpy(),
            uniforms,
            traced_entropy.cpu().numpy(),
            None if steered.first_w is None else steered.first_w.cpu().numpy(),
            [rewards.cpu().numpy() for rewards in steered.rewards],
        )

    def _steer(
        self,
        group: _Group,
        state: kernels.Guided,
        contexts: Contexts,
        reward_models: Mapping[str, RewardModel],
    ) -> Steered:
        timings = Timings()
        objectives = []
        for name in group.rewards:
            weights = [
                next(w.weight for w in member.trajectory.job.guidance.reward_models if w.model == name)
                for member in group.members
            ]
            objectives.append(
                Objective(
                    reward_models[name],
                    tuple(contexts[member.trajectory.job.id][name] for member in group.members),
                    torch.tensor(weights, dtype=torch.float64).to(self.device),
                )
            )
        steered = steer(
            state,
            self._responses(group),
            objectives,
            [member.trajectory.job.guidance.method for member in group.members],
            lambda inner: self._keys(group, inner, None),
            group.gradient_steps,
            eos_token_id=self.info.eos_token_id,
            pad_token_id=self.info.pad_token_id,
            timings=timings,
            read_after=any(member.trajectory.job.trace for member in group.members),
        )
        self.stats.reward_forward_seconds.add(timings.reward_forward_seconds)
        self.stats.reward_backward_seconds.add(timings.reward_backward_seconds)
        return steered

    def _responses(self, group: _Group) -> Responses:
        tokens = [member.trajectory.tokens for member in group.members]
        row = np.full(sum(len(response) for response in tokens), -1, dtype=np.int64)
        start = first_row = 0
        for member, response in zip(group.members, tokens, strict=True):
            row[start + member.positions] = first_row + np.arange(len(member.positions))
            start += len(response)
            first_row += len(member.positions)
        return Responses(
            lengths=tuple(len(response) for response in tokens),
            committed=torch.from_numpy(np.concatenate(tokens)).to(self.device),
            row=torch.from_numpy(row).to(self.device),
            owner=torch.from_numpy(group.repeat(range(len(group.members)))).to(self.device),
        )

    def _row_params(self, group: _Group, logits: Tensor) -> kernels.RowParams:
        """Per-row parameters (N,); temperature 0 is argmax with softmax temperature 1."""
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        sampling = [member.trajectory.job.sampling for member in group.members]
        guidance = [member.trajectory.job.guidance for member in group.members]
        vocab_size = logits.shape[-1]

        def column(values: Sequence[float | int | bool], kind: torch.dtype) -> Tensor:
            return torch.from_numpy(group.repeat(values)).to(self.device, kind)

        return kernels.RowParams(
            tau=column([s.temperature or 1.0 for s in sampling], dtype),
            top_p=column([s.top_p for s in sampling], dtype),
            top_k=column([min(s.top_k or vocab_size, vocab_size) for s in sampling], torch.long),
            greedy=column([s.temperature == 0 for s in sampling], torch.bool),
            eta=column([g.eta for g in guidance], dtype),
        )

    def _keys(self, group: _Group, inner: int, candidates: npt.NDArray[np.int64] | None) -> Tensor:
        """Random keys (n, 4) of the group's rows, or of its candidate rows."""
        jobs = [member.trajectory.job for member in group.members]
        columns = [
            group.repeat([job.sampling.seed for job in jobs]),
            group.repeat([job.prompt_index for job in jobs]),
            group.repeat([member.trajectory.index for member in group.members]),
            group.repeat([member.step.index for member in group.members]),
            np.full(sum(len(member.rows) for member in group.members), inner),
            np.concatenate([member.positions for member in group.members]),
        ]
        if candidates is not None:
            columns = [column[candidates] for column in columns]
        return row_keys(*(torch.from_numpy(column.astype(np.int64)).to(self.device) for column in columns))

    def _candidates(self, group: _Group) -> npt.NDArray[np.int64] | None:
        """Indices among the group's rows that this step may reveal, or None for all (no blocks)."""
        inside = np.concatenate(
            [
                (member.positions >= member.step.start) & (member.positions < member.step.stop)
                for member in group.members
            ]
        )
        return None if inside.all() else np.flatnonzero(inside).astype(np.int64)

    def _confidence(
        self,
        group: _Group,
        state: kernels.Guided,
        base_entropy: Tensor,
        tokens: Tensor,
        subset: Tensor | None,
    ) -> Tensor:
        """Confidence (n,) of each candidate by its own request's algorithm (section 1, point 5)."""
        kinds = [_confidence_kind(member) for member in group.members]
        candidate_entropy = base_entropy if subset is None else base_entropy[subset]
        if set(kinds) <= {"base", "origin"}:
            return -candidate_entropy
        stats = kernels.filtered_stats(state, tokens, rows=subset)
        choices = {
            "base": -candidate_entropy,
            "origin": -candidate_entropy,
            "filtered": stats.neg_entropy,
            "maskgit_plus": stats.token_probability,
            "topk_margin": stats.margin,
        }
        if len(set(kinds)) == 1:
            return choices[kinds[0]]
        names = list(choices)
        code = torch.from_numpy(group.repeat([names.index(kind) for kind in kinds])).to(self.device)
        code = code if subset is None else code[subset]
        return torch.stack([choices[name] for name in names]).gather(0, code[None])[0]

    def _ranking_uniforms(self, group: _Group, candidates: npt.NDArray[np.int64] | None) -> FloatArray | None:
        """Uniforms (n,) for `origin` and `algorithm_temperature`, where any member needs them."""
        diffusion = [member.trajectory.job.diffusion for member in group.members]
        if not any(d.algorithm == "origin" or d.algorithm_temperature for d in diffusion):
            return None
        origin = uniform(self._keys(group, INNER_ORIGIN, candidates), 0)
        ranking = uniform(self._keys(group, INNER_RANK, candidates), 0)
        is_origin = group.repeat([d.algorithm == "origin" for d in diffusion]).astype(bool)
        is_origin = is_origin if candidates is None else is_origin[candidates]
        return np.where(is_origin, origin.cpu().numpy(), ranking.cpu().numpy())

    def _commit(
        self,
        group: _Group,
        candidates: npt.NDArray[np.int64] | None,
        tokens: npt.NDArray[np.int64],
        confidence: FloatArray,
        uniforms: FloatArray | None,
        entropy: FloatArray,
        first_w: FloatArray | None,
        rewards: list[FloatArray],
    ) -> list[Revealed]:
        """Rank and reveal on the host; every array but `entropy` and `first_w` (N,) has one entry a candidate."""
        revealed = []
        candidate_start = row_start = 0
        for index, member in enumerate(group.members):
            trajectory, step = member.trajectory, member.step
            positions = member.positions
            row_slice = slice(row_start, row_start + len(positions))
            row_start += len(positions)
            positions = positions[(positions >= step.start) & (positions < step.stop)]
            candidate_slice = slice(candidate_start, candidate_start + len(positions))
            candidate_start += len(positions)
            seen = [float(reward[index]) for reward in rewards]
            conf = confidence[candidate_slice]
            if not (np.isfinite(conf).all() and np.isfinite(seen).all()):
                revealed.append(Revealed(trajectory, step, [], None, broken=True))
                continue
            drawn = tokens[candidate_slice]
            chosen = self._choose(member, conf, drawn, None if uniforms is None else uniforms[candidate_slice])
            masked_before = int(trajectory.masked.sum())
            trajectory.tokens[positions[chosen]] = drawn[chosen]
            trajectory.masked[positions[chosen]] = False
            trajectory.cursor += 1
            trajectory.model_calls += 1
            trajectory.reward_calls += group.gradient_steps
            trajectory.last_reward = seen[-1] if seen else None
            job = trajectory.job
            if job.trace:
                trajectory.trace.append(
                    StepTrace(
                        step=step.index,
                        time=step.time,
                        masked=masked_before,
                        revealed=len(chosen),
                        mean_entropy=float(entropy[row_slice].mean()),
                        mean_w=None if first_w is None else float(first_w[row_slice].mean()),
                        reward_before=seen[0] if seen else None,
                        reward_after=seen[-1] if seen else None,
                    )
                )
            shown = None
            if job.stream_canvas:
                shown = _entropies(trajectory, member, entropy[row_slice])
            pairs = [
                (int(position), int(token)) for position, token in zip(positions[chosen], drawn[chosen], strict=True)
            ]
            revealed.append(Revealed(trajectory, step, pairs, shown))
        return revealed

    def _choose(
        self,
        member: Member,
        confidence: FloatArray,
        drawn: npt.NDArray[np.int64],
        uniforms: FloatArray | None,
    ) -> npt.NDArray[np.int64]:
        diffusion = member.trajectory.job.diffusion
        if diffusion.algorithm == "origin" and uniforms is not None:
            return reveal_independently(uniforms, member.step.probability)
        return reveal_most_confident(
            confidence,
            drawn == self.info.eos_token_id,
            member.step.reveal,
            deprioritize_eos=diffusion.deprioritize_eos,
            algorithm_temperature=diffusion.algorithm_temperature,
            uniforms=uniforms,
        )


def _confidence_kind(member: Member) -> str:
    job = member.trajectory.job
    if job.diffusion.algorithm != "entropy":
        return job.diffusion.algorithm
    return "base" if member.step.guided and job.guidance.confidence == "base" else "filtered"


def _entropies(trajectory: Trajectory, member: Member, entropy: FloatArray) -> list[float | None]:
    """Entropy in nats by response position, None where revealed (or outside the rows that were computed)."""
    shown: list[float | None] = [None] * len(trajectory.tokens)
    for position, value in zip(member.positions, entropy, strict=True):
        if trajectory.masked[position]:
            shown[int(position)] = float(value)
    return shown


def _groups(batch: Batch) -> list[_Group]:
    """Members by (reward models, M); the unguided ones are one group."""
    split: dict[tuple[tuple[str, ...], int], list[Member]] = {}
    for member in batch.members:
        guidance = member.trajectory.job.guidance
        key: tuple[tuple[str, ...], int] = ((), 0)
        if member.step.guided:
            key = (
                tuple(sorted(weighted.model for weighted in guidance.reward_models)),
                guidance.gradient_steps,
            )
        split.setdefault(key, []).append(member)
    return [_Group(tuple(members), *key) for key, members in split.items()]

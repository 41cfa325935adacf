"""One denoising step for a batch of trajectories: forward, steer, draw, rank, reveal. No queues here.

The device is read once a step: confidences, drawn tokens and rewards come back together, and the ranking of each
trajectory's few dozen positions happens on the host.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import kernels
from kernels.random import INNER_FINAL
from server.diffusion.schedule import Step
from server.engine.batch import Batch, Trajectory, pack
from server.engine.group import FloatArray, Group, IntArray, groups
from server.engine.reveal import Choice, base_confidence, choose, confidence, walk, walks
from server.engine.savings import Savings
from server.engine.stats import RunnerStats
from server.guidance.steer import Objective, RewardContext, Steered, Timings, steer
from server.models.base import DiffusionModel
from server.rewards.reward_model import RewardModel
from server.types import ModelInfo, StepTrace

Contexts = Mapping[str, Mapping[str, RewardContext]]  # job id -> reward model's name -> context


@dataclass(frozen=True, slots=True)
class Revealed:
    """What a step did to one trajectory: (response position, token id) pairs; entropies (L entries, None where
    revealed) when the job streams its canvas; `broken` when the numbers were not finite."""

    trajectory: Trajectory
    step: Step
    tokens: list[tuple[int, int]]
    entropy: list[float | None] | None
    broken: bool = False


class Denoiser:
    """Runs denoising steps with one diffusion model."""

    def __init__(self, model: DiffusionModel, info: ModelInfo, savings: Savings | None = None) -> None:
        self.model, self.info = model, info
        self.savings = savings or Savings()
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
        batch = pack(trajectories, self.info.mask_token_id, self.device, share_equal=self.savings.share_equal_canvases)
        logits = self._logits(batch)
        self.stats.model_forward_seconds.add(time.perf_counter() - started)
        self.stats.batch_trajectories.add(len(batch.members))
        self.stats.batch_rows.add(batch.count)
        revealed: list[Revealed] = []
        for group in groups(batch, self.device):
            revealed += self._group_step(group, logits, contexts, reward_models)
        self.stats.denoising_steps += len(batch.members)
        self.stats.committed_tokens += sum(len(entry.tokens) for entry in revealed)
        return revealed

    def _logits(self, batch: Batch) -> Tensor:
        """phi_0 (U, V) of the batch's distinct rows, with classifier-free guidance applied."""
        if self.savings.head_on_masked_rows:
            logits = self.model.masked_logits(batch.tokens, batch.layout, batch.rows)
        else:
            everywhere = torch.arange(len(batch.tokens), device=self.device)
            logits = self.model.masked_logits(batch.tokens, batch.layout, everywhere)[batch.rows]
        if batch.cfg_rows is None or batch.cfg_scale is None:
            return logits
        conditional, blind = logits[: batch.count], logits[batch.count :]
        scale = batch.cfg_scale.to(logits.dtype)[:, None]
        mixed = blind + (scale + 1.0) * (conditional[batch.cfg_rows] - blind)
        return conditional.index_copy(0, batch.cfg_rows, mixed)

    def _group_step(
        self, group: Group, logits: Tensor, contexts: Contexts, reward_models: Mapping[str, RewardModel]
    ) -> list[Revealed]:
        rows = group.rows()
        whole = len(rows) == len(logits) and bool((rows == np.arange(len(rows))).all())
        phi_0 = logits if whole else logits[torch.from_numpy(rows).to(self.device)]
        state = kernels.begin(phi_0, group.row_params(phi_0), updates=group.gradient_steps)
        base = state.stats  # of the unguided, unfiltered distribution
        ranking = base_confidence(group, phi_0, base)
        lazy = self.savings.finish_revealed_rows_only and walks(group)
        steered = Steered()
        if group.guided:
            started = time.perf_counter()
            steered = self._steer(group, state, contexts, reward_models, finish=not lazy)
            self.stats.guidance_seconds.add(time.perf_counter() - started)

        candidates = group.candidates()
        eos = self.info.eos_token_id
        choices: list[Choice | None]
        if lazy:
            choices = walk(group, candidates, state, steered.pending, ranking.cpu().numpy(), eos)
        else:
            subset = None if candidates is None else torch.from_numpy(candidates).to(self.device)
            tokens = kernels.draw(state, group.keys(INNER_FINAL, candidates), rows=subset)
            ranked = confidence(group, state, ranking, tokens, subset)
            uniforms = group.ranking_uniforms(candidates)
            choices = choose(group, tokens.cpu().numpy(), ranked.cpu().numpy(), uniforms, eos)
        return self._commit(
            group,
            choices,
            base.entropy_1.cpu().numpy(),
            None if steered.first_w is None else steered.first_w.cpu().numpy(),
            [rewards.cpu().numpy() for rewards in steered.rewards],
        )

    def _steer(
        self,
        group: Group,
        state: kernels.Guided,
        contexts: Contexts,
        reward_models: Mapping[str, RewardModel],
        *,
        finish: bool,
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
            group.responses(),
            objectives,
            [member.trajectory.job.guidance.method for member in group.members],
            lambda inner: group.keys(inner, None),
            group.gradient_steps,
            eos_token_id=self.info.eos_token_id,
            pad_token_id=self.info.pad_token_id,
            timings=timings,
            finish=finish,
            read_after=any(member.trajectory.job.trace for member in group.members),
        )
        self.stats.reward_forward_seconds.add(timings.reward_forward_seconds)
        self.stats.reward_backward_seconds.add(timings.reward_backward_seconds)
        return steered

    def _commit(
        self,
        group: Group,
        choices: list[Choice | None],
        entropy: FloatArray,
        first_w: FloatArray | None,
        rewards: list[FloatArray],
    ) -> list[Revealed]:
        """Write the chosen tokens into the canvases. `entropy` and `first_w` are (N,), each of `rewards` (members,)."""
        revealed = []
        stop = 0
        for index, (member, choice) in enumerate(zip(group.members, choices, strict=True)):
            trajectory, step = member.trajectory, member.step
            start, stop = stop, stop + len(member.positions)
            seen = [float(reward[index]) for reward in rewards]
            if choice is None or not np.isfinite(seen).all():
                revealed.append(Revealed(trajectory, step, [], None, broken=True))
                continue
            masked_before = int(trajectory.masked.sum())
            trajectory.tokens[choice.positions] = choice.tokens
            trajectory.masked[choice.positions] = False
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
                        revealed=len(choice.positions),
                        mean_entropy=float(entropy[start:stop].mean()),
                        mean_w=None if first_w is None else float(first_w[start:stop].mean()),
                        reward_before=seen[0] if seen else None,
                        reward_after=seen[-1] if seen else None,
                    )
                )
            shown = None
            if job.stream_canvas:
                shown = _entropies(trajectory, member.positions, entropy[start:stop])
            pairs = [(int(p), int(t)) for p, t in zip(choice.positions, choice.tokens, strict=True)]
            revealed.append(Revealed(trajectory, step, pairs, shown))
        return revealed


def _entropies(trajectory: Trajectory, positions: IntArray, entropy: FloatArray) -> list[float | None]:
    """Entropy in nats by response position, None where revealed (or outside the rows that were computed)."""
    shown: list[float | None] = [None] * len(trajectory.tokens)
    for position, value in zip(positions, entropy, strict=True):
        if trajectory.masked[int(position)]:
            shown[int(position)] = float(value)
    return shown

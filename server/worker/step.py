"""One denoising step for a batch of trajectories: forward, steer, draw, rank, reveal. No queues here.

The device is read once a step: confidences, drawn tokens and rewards come back together, and the ranking of each
trajectory's few dozen positions happens on the host.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

import kernels
from kernels.random import INNER_FINAL
from kernels.transfer import download, upload
from server.budget import Budget, Cost
from server.diffusion.schedule import Step
from server.guidance.assembly import Timings
from server.models.base import DiffusionModel
from server.rewards.reward_model import RewardModel
from server.types import ModelInfo, StepTrace
from server.wire.stats import RunnerStats
from server.worker.group import FloatArray, Group, IntArray, groups
from server.worker.inner import Cohort, Contexts, inner_steps, objectives_of
from server.worker.memory import reward_tokens
from server.worker.microbatch import StepLimits
from server.worker.pack import Batch, Trajectory, pack
from server.worker.reveal import Choice, base_confidence, choose, confidence
from server.worker.savings import Savings

LogitsOf = Callable[[IntArray], Tensor]  # phi_0 (n, V) of some of a batch's distinct rows (n,)


@dataclass(slots=True)
class _Seconds:
    """What a step's parts took together, and the distinct rows that they had."""

    forward: float = 0.0
    guidance: float = 0.0
    reward: Timings = field(default_factory=Timings)
    rows: int = 0


@dataclass(frozen=True, slots=True)
class Revealed:
    """What a step did to one trajectory: (response position, token id) pairs; entropies (L entries, None where
    revealed) when the job streams its canvas. It did nothing, and will not, where the numbers were not finite
    (`broken`) or memory ran out (`out_of_memory`)."""

    trajectory: Trajectory
    step: Step
    tokens: list[tuple[int, int]]
    entropy: list[float | None] | None
    broken: bool = False
    out_of_memory: bool = False


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What a micro-batch, or a cohort of it, decided, on the host: a choice a member, entropies (N,) and w (N,) of its
    rows, and each inner step's rewards (members,)."""

    group: Group
    choices: list[Choice | None]
    entropy: FloatArray
    first_w: FloatArray | None
    rewards: list[FloatArray]


class Denoiser:
    """Runs denoising steps with one diffusion model, in parts where `budget` (or memory) demands it."""

    def __init__(
        self,
        model: DiffusionModel,
        info: ModelInfo,
        savings: Savings | None = None,
        budget: Budget | None = None,
    ) -> None:
        self.model, self.info = model, info
        self.savings = savings or Savings()
        self.device = model.device
        self.stats = RunnerStats()
        self.limits = StepLimits.of(budget or Budget(), self._ran_out)

    @torch.no_grad()
    def step(
        self,
        trajectories: Sequence[tuple[Trajectory, Step]],
        contexts: Contexts,
        reward_models: Mapping[str, RewardModel],
    ) -> list[Revealed]:
        """One step of every given trajectory. They are changed in place, and only when all else is done, so a part
        of the step that runs out of memory can run again."""
        seconds = _Seconds()
        parts, lost = self.limits.forwards.run(
            trajectories,
            [(Cost.of(trajectory.job).tokens,) for trajectory, _ in trajectories],
            lambda part: self._decide_part(part, contexts, reward_models, seconds),
        )
        revealed: list[Revealed] = []
        for outcomes, out_of_memory in parts:
            lost += out_of_memory
            for outcome in outcomes:
                revealed += self._commit(outcome)
        revealed += [Revealed(trajectory, step, [], None, out_of_memory=True) for trajectory, step in lost]
        self._count(trajectories, revealed, seconds)
        return revealed

    def _decide_part(
        self,
        trajectories: Sequence[tuple[Trajectory, Step]],
        contexts: Contexts,
        reward_models: Mapping[str, RewardModel],
        seconds: _Seconds,
    ) -> tuple[list[_Outcome], list[tuple[Trajectory, Step]]]:
        """One forward and what follows from it, by group and micro-batch; and the trajectories that memory ran out
        for. What is kept of the forward is its hidden states: the logits, V / d times as large, are made for one
        micro-batch at a time."""
        started = time.perf_counter()
        batch = pack(trajectories, self.info.mask_token_id, self.device, share_equal=self.savings.share_equal_canvases)
        logits_of = self._forward(batch)
        seconds.forward += time.perf_counter() - started
        seconds.rows += batch.count
        outcomes: list[_Outcome] = []
        lost: list[tuple[Trajectory, Step]] = []
        for group in groups(batch, self.device, share_inner_steps=self.savings.share_inner_steps):
            of_group = self.limits.guided if group.guided else self.limits.unguided
            done, out_of_memory = of_group.run(
                group.members,
                [_size(member.trajectory, member.step, contexts, reward_models) for member in group.members],
                lambda part, group=group: self._group_step(  # type: ignore[misc]
                    replace(group, members=tuple(part)), logits_of, contexts, reward_models, seconds
                ),
            )
            outcomes += [outcome for part in done for outcome in part]
            lost += [(member.trajectory, member.step) for member in out_of_memory]
        return outcomes, lost

    def _forward(self, batch: Batch) -> LogitsOf:
        """Run the diffusion model; phi_0 (n, V) of any of the batch's distinct rows (n,) is then made on demand."""
        head: Callable[[Tensor], Tensor]
        if self.savings.head_on_masked_rows:
            run, head = partial(self.model.masked_hidden, batch.tokens, batch.layout, batch.rows), self.model.head
        else:
            everywhere = torch.arange(len(batch.tokens), device=self.device)
            run, head = partial(self.model.masked_logits, batch.tokens, batch.layout, everywhere), torch.clone
        kept = run()
        if not self.savings.head_on_masked_rows:
            kept = kept[batch.rows]

        def plain(rows: IntArray) -> Tensor:
            whole = len(rows) == len(kept) and bool((rows == np.arange(len(rows))).all())
            return head(kept if whole else kept[upload(torch.from_numpy(rows), self.device)])

        def logits_of(rows: IntArray) -> Tensor:
            """With classifier-free guidance applied: b + (s + 1) (c - b), in place."""
            blind = batch.blind[rows]
            if (blind < 0).all():
                return plain(rows)
            twins = np.flatnonzero(blind >= 0)
            logits = plain(np.concatenate([rows, blind[twins]]))
            where = upload(torch.from_numpy(twins), self.device)
            scale = upload(torch.from_numpy(batch.cfg_scale[rows[twins]]), self.device, logits.dtype)[:, None]
            without = logits[len(rows) :]
            return logits[: len(rows)].index_copy_(
                0, where, logits[where].sub_(without).mul_(scale.add_(1.0)).add_(without)
            )

        return logits_of

    def _group_step(
        self,
        group: Group,
        logits_of: LogitsOf,
        contexts: Contexts,
        reward_models: Mapping[str, RewardModel],
        seconds: _Seconds,
    ) -> list[_Outcome]:
        """Logits, guidance, draws and choices of one micro-batch, by cohort. Changes nothing but `seconds`."""
        started = time.perf_counter()
        rows = group.rows()
        distinct, places = np.unique(rows, return_inverse=True)
        if len(distinct) == len(rows):
            phi_0 = logits_of(rows)
        else:
            phi_0 = logits_of(distinct)[upload(torch.from_numpy(places), self.device)]
        seconds.forward += time.perf_counter() - started
        state = kernels.begin(phi_0, group.row_params(phi_0), updates=group.gradient_steps)
        base = state.stats  # of the unguided, unfiltered distribution
        ranking = base_confidence(group, phi_0, base)
        cohorts = [Cohort(group, state)]
        if group.guided:
            started = time.perf_counter()
            grows = self.savings.reward_prefix_cache and self.savings.grow_reward_prefix
            objectives = objectives_of(group, contexts, reward_models, self.info, seconds.reward, grows=grows)
            cohorts = inner_steps(group, state, objectives, self.info, seconds.reward)
            seconds.guidance += time.perf_counter() - started
        return [self._choose(cohort, ranking[cohort.rows], base.entropy_1[cohort.rows]) for cohort in cohorts]

    def _choose(self, cohort: Cohort, ranking: Tensor, entropy: Tensor) -> _Outcome:
        """Draws and choices of a cohort, whose rows' confidences in the base distribution and entropies these are."""
        group, state = cohort.group, cohort.state
        candidates, eos = group.candidates(), self.info.eos_token_id
        shown = entropy, cohort.first_w, *cohort.rewards
        subset = None if candidates is None else upload(torch.from_numpy(candidates), self.device)
        tokens = kernels.draw(state, group.keys(INNER_FINAL, candidates), rows=subset)
        ranked = confidence(group, state, ranking, tokens, subset)
        drawn, confidences, uniforms, *rest = download((tokens, ranked, group.ranking_uniforms(candidates), *shown))
        return _Outcome(group, choose(group, drawn, confidences, uniforms, eos), rest[0], rest[1], rest[2:])

    def _commit(self, outcome: _Outcome) -> list[Revealed]:
        """Write the chosen tokens into the canvases."""
        group, entropy, first_w, rewards = outcome.group, outcome.entropy, outcome.first_w, outcome.rewards
        revealed = []
        stop = 0
        for index, (member, choice) in enumerate(zip(group.members, outcome.choices, strict=True)):
            trajectory, step = member.trajectory, member.step
            start, stop = stop, stop + len(member.positions)
            # Rewards after the last inner step are read for traced members; a neighbour's answer does not show it.
            read = group.gradient_steps + member.trajectory.job.trace
            seen = [float(reward[index]) for reward in rewards[:read]]
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

    def _count(
        self, trajectories: Sequence[tuple[Trajectory, Step]], revealed: Sequence[Revealed], seconds: _Seconds
    ) -> None:
        stats = self.stats
        stats.model_forward_seconds.add(seconds.forward)
        if seconds.guidance:
            stats.guidance_seconds.add(seconds.guidance)
            stats.reward_forward_seconds.add(seconds.reward.reward_forward_seconds)
            stats.reward_backward_seconds.add(seconds.reward.reward_backward_seconds)
        stats.batch_trajectories.add(len(trajectories))
        stats.batch_rows.add(seconds.rows)
        stats.denoising_steps += len(trajectories)
        stats.committed_tokens += sum(len(entry.tokens) for entry in revealed)

    def _ran_out(self) -> None:
        self.stats.out_of_memory += 1


def _size(
    trajectory: Trajectory, step: Step, contexts: Contexts, reward_models: Mapping[str, RewardModel]
) -> tuple[int, ...]:
    """What a trajectory's step takes of the limits: rows of logits and, when guided, reward-model tokens."""
    job = trajectory.job
    rows = len(trajectory.positions(step)) * (2 if job.diffusion.cfg_scale else 1)
    if not step.guided:
        return (rows,)
    most = 0
    for weighted in job.guidance.reward_models:
        context = contexts[job.id][weighted.model]
        own = len(context.lead_ids) + len(trajectory.tokens) + len(context.suffix_ids)
        most = max(most, reward_tokens(reward_models[weighted.model], own, context.prefix.length))
    return rows, most


def _entropies(trajectory: Trajectory, positions: IntArray, entropy: FloatArray) -> list[float | None]:
    """Entropy in nats by response position, None where revealed (or outside the rows that were computed)."""
    shown: list[float | None] = [None] * len(trajectory.tokens)
    for position, value in zip(positions, entropy, strict=True):
        if trajectory.masked[int(position)]:
            shown[int(position)] = float(value)
    return shown

"""One denoising step for a batch of trajectories: forward, steer, draw, rank, reveal. No queues here.

The device is read once for each cohort: confidences, drawn tokens and rewards come back together, and the ranking of
each trajectory's few dozen positions happens on the host.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

import kernels
from kernels.transfer import upload_all
from server.budget import Budget, Cost, steered_rows
from server.diffusion.schedule import Step
from server.guidance.assembly import Timings
from server.models.base import DiffusionModel
from server.rewards.reward_model import RewardModel
from server.types import ModelInfo, StepTrace
from server.wire.stats import RunnerStats
from server.worker.failures import Limits, free_memory
from server.worker.inner import Cohort, InnerSteps
from server.worker.memory import cached_share
from server.worker.pack import Forward, Group, Member, groups, pack
from server.worker.reveal import Decision, base_confidence, decide
from server.worker.savings import Savings
from server.worker.trajectory import Trajectory


@dataclass(slots=True)
class Spent(Timings):
    """Seconds that the parts of one step took together, and the distinct rows that they had."""

    forward: float = 0.0
    guidance: float = 0.0
    rows: int = 0


class Denoiser:
    """All that a denoising step needs: the models, what may be saved, and how large its parts may be.

    A step takes as many forwards of the diffusion model as `forwards` makes of it (canvas tokens), and what follows
    from one forward is done in parts, of `guided` members (rows of logits, reward-model tokens) or `unguided` ones
    (rows). A part for which memory runs out runs again in halves. `spent` is what the last step took.
    """

    def __init__(
        self,
        model: DiffusionModel,
        info: ModelInfo,
        reward_models: Mapping[str, RewardModel],
        savings: Savings | None = None,
        budget: Budget | None = None,
        backend: str | None = None,
    ) -> None:
        self.backend = backend
        self.model, self.info, self.reward_models = model, info, reward_models
        self.savings = savings or Savings()
        self.device = model.device
        self.stats = RunnerStats()
        grows = self.savings.reward_prefix_cache and self.savings.grow_reward_prefix
        self.inner_steps = InnerSteps(info, reward_models, grows=grows)
        budget = budget or Budget()
        self.forwards = Limits("forward (canvas tokens)", (budget.tokens,), self.ran_out)
        self.guided = Limits("guidance (rows, tokens)", (budget.guided_rows, budget.reward_tokens), self.ran_out)
        self.unguided = Limits("unguided rows", (budget.logit_rows,), self.ran_out)
        self._cached_share = {name: cached_share(model) for name, model in reward_models.items()}
        self.spent = Spent()

    def ran_out(self) -> None:
        """Count that memory did, and free what can be freed."""
        self.stats.out_of_memory += 1
        free_memory()

    @torch.no_grad()
    def step(self, trajectories: Sequence[tuple[Trajectory, Step]]) -> list[Decision]:
        """One step of every given trajectory, and what it did. They are changed only when all else is done, but for the
        cached blocks, which are settled already, so a part of the step that runs out of memory can run again."""
        self.spent = self.inner_steps.timings = Spent()
        decisions: list[Decision] = []
        sizes = [(Cost.of(trajectory.job).tokens,) for trajectory, _ in trajectories]
        for part in self.forwards.parts(trajectories, sizes):
            with part:
                decisions += self._forward(part.items)
            if part.lost:
                decisions += [Decision(*each, failure="out_of_memory") for each in part.items]
        for decision in decisions:
            self._commit(decision)
        self._count(decisions)
        return decisions

    def _forward(self, trajectories: Sequence[tuple[Trajectory, Step]]) -> list[Decision]:
        """One forward, and what follows from it by group and part."""
        started = time.perf_counter()
        batch = pack(
            trajectories,
            self.info.mask_token_id,
            self.device,
            share_equal=self.savings.share_equal_canvases,
            keep_blocks=self.savings.block_cache,
        )
        inputs = batch.tokens, batch.layout
        if self.savings.head_on_masked_rows:
            forward = Forward(batch, self.model.masked_hidden(*inputs, batch.rows, batch.kept), self.model.head)
        else:
            everywhere = torch.arange(len(batch.tokens), device=self.device)
            logits = self.model.head(self.model.masked_hidden(*inputs, everywhere, batch.kept))
            forward = Forward(batch, logits[batch.rows], torch.clone)
        batch.grow()
        self.spent.forward += time.perf_counter() - started
        self.spent.rows += len(batch.blind)
        decisions: list[Decision] = []
        for group in groups(batch, self.device, share_inner_steps=self.savings.share_inner_steps):
            limits = self.guided if group.rewards else self.unguided
            for part in limits.parts(group.members, [self._size(each, group) for each in group.members]):
                with part:
                    decisions += self._decide(group.of(part.items), forward)
                if part.lost:
                    decisions += [Decision(m.trajectory, m.step, failure="out_of_memory") for m in part.items]
        return decisions

    def _decide(self, group: Group, forward: Forward) -> list[Decision]:
        """Logits, guidance, draws and choices of one part."""
        started = time.perf_counter()
        (wanted,) = upload_all([forward.wanted(group.members)], self.device)
        phi_0 = forward.logits(wanted)
        self.spent.forward += time.perf_counter() - started
        params, keys = upload_all([group.row_params(phi_0), group.keys()], self.device)
        state = kernels.begin(phi_0, params, backend=self.backend, updates=group.gradient_steps)
        ranking, stats = base_confidence(group, phi_0, state), state.stats
        cohorts = [Cohort(group, state, keys, slice(None))]
        if group.rewards:
            started = time.perf_counter()
            cohorts = self.inner_steps.run(group, state, keys)
            self.spent.guidance += time.perf_counter() - started
        decisions = []
        for cohort in cohorts:
            rows = cohort.rows
            decisions += decide(cohort, ranking[rows], stats.entropy_1[rows], stats.lse_1[rows], self.info)
        return decisions

    def _commit(self, decision: Decision) -> None:
        """Write what was chosen and seen into the trajectory, which goes on to its next step."""
        if decision.failure:
            return
        trajectory, step, rewards = decision.trajectory, decision.step, decision.rewards
        masked = trajectory.left
        if decision.guesses is not None:
            trajectory.estimate = trajectory.tokens[: trajectory.stop(step)].copy()
            trajectory.estimate[decision.positions] = decision.guesses
            trajectory.estimate[decision.chosen] = decision.tokens
        trajectory.log_probability += decision.log_probability
        trajectory.tokens[decision.chosen] = decision.tokens
        trajectory.masked[decision.chosen] = False
        trajectory.step_map[decision.chosen] = step.index
        trajectory.cursor += 1
        trajectory.taken += 1
        trajectory.reward_calls += len(rewards) * len(trajectory.job.guidance.reward_models)
        trajectory.last_reward = rewards[-1] if rewards else None
        if trajectory.job.trace:
            trajectory.trace.append(
                StepTrace(
                    step=step.index,
                    time=step.time,
                    masked=masked,
                    revealed=masked - trajectory.left,
                    mean_entropy=float(decision.entropy.mean()),
                    mean_w=decision.mean_w,
                    reward_before=rewards[0] if rewards else None,
                    reward_after=rewards[-1] if rewards else None,
                )
            )

    def _size(self, member: Member, group: Group) -> tuple[int, ...]:
        """What a member takes of its limits: rows of logits and, where its canvas is read, reward-model tokens."""
        trajectory = member.trajectory
        rows = len(member.rows) * (2 if trajectory.job.diffusion.cfg_scale else 1)
        if not member.rewards:
            return (rows,)
        most = 0
        for name in member.rewards:
            context = trajectory.contexts[name]
            own = len(context.lead_ids) + len(member.response) + len(context.suffix_ids)
            most = max(most, own + math.ceil(context.prefix.length * self._cached_share[name]))
        return steered_rows(rows, group.gradient_steps), most

    def _count(self, decisions: Sequence[Decision]) -> None:
        stats, spent = self.stats, self.spent
        stats.model_forward_seconds.add(spent.forward)
        if spent.guidance:
            stats.guidance_seconds.add(spent.guidance)
            stats.reward_forward_seconds.add(spent.reward_forward_seconds)
            stats.reward_backward_seconds.add(spent.reward_backward_seconds)
        stats.batch_trajectories.add(len(decisions))
        stats.batch_rows.add(spent.rows)
        stats.denoising_steps += len(decisions)
        stats.committed_tokens += sum(len(decision.chosen) for decision in decisions)

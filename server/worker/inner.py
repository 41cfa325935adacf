"""The inner steps of a group: all members go through them together, and those of smaller M leave early.

Members come by M, the largest first. So those that leave next are at the end, those that stay are a range of rows at
the beginning, and the state splits in its own memory: a group takes no more than if every member had the largest M.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import kernels
from server.guidance.assembly import Objective, Responses, Timings
from server.guidance.prefixes import grow
from server.guidance.steer import Steered, steer
from server.rewards.reward_model import RewardModel
from server.types import GuidanceParams, ModelInfo
from server.worker.pack import Group


@dataclass(frozen=True, slots=True)
class Cohort:
    """Members of a group with the same M, when they are through with their inner steps; N rows.

    `keys` (M + 2, N, 4) are their random keys (`Group.keys`), and `rows` their rows among the whole group's.
    `rewards`, (members,) each, are those before each inner step, and once more after the last where a member is traced;
    `first_w` (N,) is w at the first.
    """

    group: Group
    state: kernels.Guided
    keys: Tensor
    rows: slice
    rewards: tuple[Tensor, ...] = ()
    first_w: Tensor | None = None


class InnerSteps:
    """Steers groups with these reward models. With `grows` the cached conversations take in what is settled of the
    answers. `timings` adds up the reward models' seconds; a denoising step begins with fresh ones."""

    def __init__(self, info: ModelInfo, reward_models: Mapping[str, RewardModel], *, grows: bool) -> None:
        self.info, self.reward_models, self.grows = info, reward_models, grows
        self.timings = Timings()

    def run(self, group: Group, state: kernels.Guided, keys: Tensor) -> list[Cohort]:
        """Steer `state`, the rows of a guided group with its random `keys`, and split it as members leave: cohorts,
        the smallest M first."""
        objectives = [self._objective(name, group) for name in group.rewards]
        cohorts: list[Cohort] = []
        staying, done = group, 0
        seen: list[Tensor] = []  # rewards before each inner step so far, of the members that were there
        first_w: Tensor | None = None
        by_steps = itertools.groupby(reversed(group.members), key=lambda member: member.step.gradient_steps)
        for leaving in [group.of(tuple(members)[::-1]) for _, members in by_steps]:
            steered = self._steer(staying, state, keys, objectives, range(done, leaving.gradient_steps))
            seen += steered.rewards
            first_w = steered.first_w if first_w is None else first_w
            done = leaving.gradient_steps
            first = len(staying.members) - len(leaving.members)
            after = [_part(objective, slice(first, None)) for objective in objectives]
            objectives = [_part(objective, slice(0, first)) for objective in objectives]
            staying = staying.of(staying.members[:first])
            row, left = staying.count, state
            if row:
                state, left = state.split(row, done)
            keys, own = keys[:, :row], keys[:, row:]
            rewards = [reward[first : first + len(leaving.members)] for reward in seen]
            if any(member.trajectory.job.trace for member in leaving.members):
                rewards += self._steer(leaving, left, own, after, range(done, done), reads=True).rewards
            rows = slice(row, row + leaving.count)
            cohorts.append(Cohort(leaving, left, own, rows, tuple(rewards), None if first_w is None else first_w[rows]))
        return cohorts

    def _steer(
        self,
        group: Group,
        state: kernels.Guided,
        keys: Tensor,
        objectives: list[Objective],
        steps: range,
        *,
        reads: bool = False,
    ) -> Steered:
        responses = Responses.of(
            [member.response for member in group.members],
            [member.positions for member in group.members],
            ends=[member.trajectory.length for member in group.members],
            eos_token_id=self.info.eos_token_id,
            pad_token_id=self.info.pad_token_id,
        )
        return steer(
            state,
            responses,
            objectives,
            [_read_as(member.trajectory.job.guidance) for member in group.members],
            [member.step for member in group.members],
            keys.__getitem__,
            steps.stop,
            first_step=steps.start,
            timings=self.timings,
            read_after=reads,
        )

    def _objective(self, name: str, group: Group) -> Objective:
        """One reward model with every member's context and weight."""
        model, trajectories = self.reward_models[name], [member.trajectory for member in group.members]
        contexts = [trajectory.contexts[name] for trajectory in trajectories]
        if self.grows:
            # What has been settled never changes, so the contexts stay right if this step fails.
            started = time.perf_counter()
            tokens = [trajectory.tokens for trajectory in trajectories]
            # Something is masked in each, but perhaps only past the answer.
            first = [min(int(trajectory.masked.argmax()), trajectory.length) for trajectory in trajectories]
            contexts = grow(model, contexts, tokens, first, self.info.eos_token_id, self.info.pad_token_id)
            for trajectory, context in zip(trajectories, contexts, strict=True):
                trajectory.contexts[name] = context
            self.timings.reward_forward_seconds += time.perf_counter() - started
        weights = [{w.model: w.weight for w in t.job.guidance.reward_models}[name] for t in trajectories]
        return Objective(model, tuple(contexts), torch.tensor(weights, dtype=torch.float64))


def _read_as(guidance: GuidanceParams) -> str:
    """The method whose embeddings a reward model reads. One without gradient has none, and is read for its trace alone:
    as `expectation`, whose soft embeddings depend on no draw."""
    return guidance.method if guidance.uses_gradient else "expectation"


def _part(objective: Objective, members: slice) -> Objective:
    return replace(objective, contexts=objective.contexts[members], weights=objective.weights[members])

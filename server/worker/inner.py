"""The inner steps of a group: all members go through them together, and those of smaller M leave early.

Members come by M, the largest first. So who leaves next is at the end, who stays is a range of rows at the beginning,
and the state splits in its own memory: a group takes no more than if every member had the largest M.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import kernels
from kernels.transfer import upload
from server.guidance.assembly import Objective, Timings
from server.guidance.prefixes import RewardContext, grow
from server.guidance.steer import Steered, steer
from server.rewards.reward_model import RewardModel
from server.types import ModelInfo
from server.worker.group import Group

Contexts = Mapping[str, Mapping[str, RewardContext]]  # job id -> reward model's name -> context


@dataclass(frozen=True, slots=True)
class Cohort:
    """Members of a group with the same M, when they are through with their inner steps; N rows.

    `first_row` is where their rows begin among the whole group's. `rewards`, (members,) each, are those before each
    inner step, and once more after the last where a member is traced; `first_w` (N,) is w at the first.
    """

    group: Group
    state: kernels.Guided
    first_row: int = 0
    rewards: tuple[Tensor, ...] = ()
    first_w: Tensor | None = None

    @property
    def rows(self) -> slice:
        """Of the whole group's rows."""
        return slice(self.first_row, self.first_row + self.group.count)


def inner_steps(
    group: Group,
    state: kernels.Guided,
    objectives: Sequence[Objective],
    info: ModelInfo,
    timings: Timings,
) -> list[Cohort]:
    """Steer `state`, the rows of a guided group, and split it as members leave: cohorts, the smallest M first."""
    cohorts: list[Cohort] = []
    staying, done = group, 0
    seen: list[Tensor] = []  # rewards before each inner step so far, of the members who were there
    first_w: Tensor | None = None
    for leaving in reversed(group.by_gradient_steps()):
        steered = _steer(staying, state, objectives, info, timings, done, leaving.gradient_steps)
        seen += steered.rewards
        first_w = steered.first_w if first_w is None else first_w
        count, done = len(staying.members), leaving.gradient_steps
        staying = staying.part(slice(0, count - len(leaving.members)))
        theirs, row, left = slice(len(staying.members), count), staying.count, state
        if row:
            state, left = state.split(row, done)
        rewards = [reward[theirs] for reward in seen]
        if any(member.trajectory.job.trace for member in leaving.members):
            after = [_part(objective, theirs) for objective in objectives]
            rewards += _steer(leaving, left, after, info, timings, done, done, read_after=True).rewards
        objectives = [_part(objective, slice(0, theirs.start)) for objective in objectives]
        w = None if first_w is None else first_w[row : row + leaving.count]
        cohorts.append(Cohort(leaving, left, row, tuple(rewards), w))
    return cohorts


def _steer(
    group: Group,
    state: kernels.Guided,
    objectives: Sequence[Objective],
    info: ModelInfo,
    timings: Timings,
    first: int,
    stop: int,
    *,
    read_after: bool = False,
) -> Steered:
    return steer(
        state,
        group.responses(info),
        objectives,
        [member.trajectory.job.guidance.method for member in group.members],
        [member.step for member in group.members],
        lambda inner: group.keys(inner, None),
        stop,
        first_step=first,
        eos_token_id=info.eos_token_id,
        pad_token_id=info.pad_token_id,
        timings=timings,
        read_after=read_after,
    )


def _part(objective: Objective, members: slice) -> Objective:
    return replace(objective, contexts=objective.contexts[members], weights=objective.weights[members])


def objectives_of(
    group: Group,
    contexts: Contexts,
    reward_models: Mapping[str, RewardModel],
    info: ModelInfo,
    timings: Timings,
    *,
    grows: bool,
) -> list[Objective]:
    """What moves a group's rows: each of its reward models with every member's context and weight.

    Where the prefix `grows`, by what has been settled since the last step. Keeping it is no harm if this one fails.
    """
    objectives = []
    for name in group.rewards:
        weights = [
            next(w.weight for w in member.trajectory.job.guidance.reward_models if w.model == name)
            for member in group.members
        ]
        objectives.append(
            Objective(
                reward_models[name],
                _grown(name, group, contexts, reward_models[name], info, timings) if grows
                else _known(name, group, contexts),
                upload(torch.tensor(weights, dtype=torch.float64), group.device),
            )
        )  # fmt: skip
    return objectives


def _known(name: str, group: Group, contexts: Contexts) -> tuple[RewardContext, ...]:
    trajectories = [member.trajectory for member in group.members]
    return tuple(t.reward_contexts.get(name) or contexts[t.job.id][name] for t in trajectories)


def _grown(
    name: str, group: Group, contexts: Contexts, model: RewardModel, info: ModelInfo, timings: Timings
) -> tuple[RewardContext, ...]:
    trajectories = [member.trajectory for member in group.members]
    known = _known(name, group, contexts)
    started = time.perf_counter()
    grown = grow(
        model,
        known,
        [trajectory.tokens for trajectory in trajectories],
        [int(trajectory.masked.argmax()) for trajectory in trajectories],  # something is masked in every step's canvas
        info.eos_token_id,
        info.pad_token_id,
    )
    for trajectory, context in zip(trajectories, grown, strict=True):
        trajectory.reward_contexts[name] = context
    timings.reward_forward_seconds += time.perf_counter() - started
    return tuple(grown)

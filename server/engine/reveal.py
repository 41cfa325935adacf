"""Which tokens a step reveals: confidences on the device, ranking on the host (algorithm.md, section 1, points 4 to 6).

Two ways to the same answer. `choose` has every candidate's token and confidence. `walk` is for groups whose ranking is
known before guidance ends: it finishes and draws only the rows that are about to be revealed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import kernels
from kernels.random import INNER_FINAL
from server.diffusion.sampler import rank, reveal_independently, reveal_most_confident
from server.engine.batch import Member
from server.engine.group import FloatArray, Group, IntArray


@dataclass(frozen=True, slots=True)
class Choice:
    """Response positions that one trajectory reveals, ascending, and their tokens; both (k,) int64."""

    positions: IntArray
    tokens: IntArray


def confidence_kind(member: Member) -> str:
    """Which number ranks a member's candidates: an algorithm's name, or for `entropy` the distribution it is of."""
    job = member.trajectory.job
    if job.diffusion.algorithm != "entropy":
        return job.diffusion.algorithm
    return "base" if member.step.guided and job.guidance.confidence == "base" else "filtered"


def confidence(
    group: Group, state: kernels.Guided, base_entropy: Tensor, tokens: Tensor, subset: Tensor | None
) -> Tensor:
    """Confidence (n,) of each candidate by its own request's algorithm; `tokens` (n,) are the drawn ones."""
    kinds = [confidence_kind(member) for member in group.members]
    base = -(base_entropy if subset is None else base_entropy[subset])
    if set(kinds) <= {"base", "origin"}:
        return base
    stats = kernels.filtered_stats(state, tokens, rows=subset)
    choices = {
        "base": base,
        "origin": base,
        "filtered": stats.neg_entropy,
        "maskgit_plus": stats.token_probability,
        "topk_margin": stats.margin,
    }
    if len(set(kinds)) == 1:
        return choices[kinds[0]]
    names = list(choices)
    code = torch.from_numpy(group.repeat([names.index(kind) for kind in kinds])).to(base.device)
    code = code if subset is None else code[subset]
    return torch.stack([choices[name] for name in names]).gather(0, code[None])[0]


def choose(
    group: Group, tokens: IntArray, ranked: FloatArray, uniforms: FloatArray | None, eos_token_id: int
) -> list[Choice | None]:
    """Each member's choice among its candidates, or None where a confidence is not finite.

    `tokens`, `ranked` (the confidences) and `uniforms` have one entry a candidate, in the order of the group's rows.
    """
    choices: list[Choice | None] = []
    stop = 0
    for member in group.members:
        positions = _candidate_positions(member)
        start, stop = stop, stop + len(positions)
        drawn, conf = tokens[start:stop], ranked[start:stop]
        if not np.isfinite(conf).all():
            choices.append(None)
            continue
        diffusion = member.trajectory.job.diffusion
        if diffusion.algorithm == "origin" and uniforms is not None:
            chosen = reveal_independently(uniforms[start:stop], member.step.probability)
        else:
            chosen = reveal_most_confident(
                conf,
                drawn == eos_token_id,
                member.step.reveal,
                deprioritize_eos=diffusion.deprioritize_eos,
                algorithm_temperature=diffusion.algorithm_temperature,
                uniforms=None if uniforms is None else uniforms[start:stop],
            )
        choices.append(Choice(positions[chosen], drawn[chosen]))
    return choices


def walks(group: Group) -> bool:
    """Whether every member's ranking is known before its logits are: `entropy` with `base` confidence, nothing random.
    A trace reads the reward once more after the last update, so it needs all rows."""
    return group.guided and all(
        confidence_kind(member) == "base"
        and not member.trajectory.job.diffusion.algorithm_temperature
        and not member.trajectory.job.trace
        for member in group.members
    )


def walk(
    group: Group,
    candidates: IntArray | None,
    state: kernels.Guided,
    pending: Sequence[kernels.Term],
    base: FloatArray,
    eos_token_id: int,
) -> list[Choice | None]:
    """Walk down each member's ranking: finish and draw k rows, then, where EOS tokens came, as many more.

    `pending` is the last update, not yet made; `base` (N,) the confidence of every row. A drawn EOS ranks after all
    others, so rows are taken until k hold another token; if fewer do, the EOS rows fill up in ranking order.
    """
    orders: list[IntArray] = []
    first = 0
    for member in group.members:
        rows = first + np.arange(len(member.positions))
        first += len(member.positions)
        if candidates is not None:
            rows = rows[(member.positions >= member.step.start) & (member.positions < member.step.stop)]
        orders.append(rows[rank(base[rows], np.zeros(len(rows), dtype=np.bool_))])
    tokens: dict[int, int] = {}
    asked = [order[: member.step.reveal] for order, member in zip(orders, group.members, strict=True)]
    while any(len(rows) for rows in asked):
        rows = np.concatenate(asked)
        for row, token in zip(rows, _finish(group, state, pending, rows), strict=True):
            tokens[int(row)] = int(token)
        asked = [
            _missing(member, order, tokens, eos_token_id) for order, member in zip(orders, group.members, strict=True)
        ]
    position_of = np.concatenate([member.positions for member in group.members])
    return [
        _settle(member, order, tokens, position_of, base, eos_token_id)
        for order, member in zip(orders, group.members, strict=True)
    ]


def _finish(group: Group, state: kernels.Guided, pending: Sequence[kernels.Term], rows: IntArray) -> IntArray:
    """Make the last update for some rows and draw their tokens, (n,)."""
    index = torch.from_numpy(rows).to(group.device)
    finished = state.select(index)
    kernels.update(finished, [kernels.Term(term.g[index], term.table, term.soft[index]) for term in pending])
    drawn: IntArray = kernels.draw(finished, group.keys(INNER_FINAL, rows)).cpu().numpy()
    return drawn


def _missing(member: Member, order: IntArray, tokens: dict[int, int], eos_token_id: int) -> IntArray:
    """The next rows of a member's ranking to draw: one for every EOS that took the place of another token."""
    drawn = [int(row) for row in order if int(row) in tokens]
    if not member.trajectory.job.diffusion.deprioritize_eos:
        return order[:0]
    held = sum(tokens[row] != eos_token_id for row in drawn)
    return order[len(drawn) : len(drawn) + member.step.reveal - held]


def _settle(
    member: Member,
    order: IntArray,
    tokens: dict[int, int],
    position_of: IntArray,
    base: FloatArray,
    eos_token_id: int,
) -> Choice | None:
    if not np.isfinite(base[order]).all():
        return None
    drawn = [int(row) for row in order if int(row) in tokens]
    if member.trajectory.job.diffusion.deprioritize_eos:
        drawn.sort(key=lambda row: tokens[row] == eos_token_id)  # stable: ranking order among equals
    rows = np.sort(np.array(drawn[: member.step.reveal], dtype=np.int64))
    return Choice(position_of[rows], np.array([tokens[int(row)] for row in rows], dtype=np.int64))


def _candidate_positions(member: Member) -> IntArray:
    inside = (member.positions >= member.step.start) & (member.positions < member.step.stop)
    return member.positions[inside]

"""Which tokens a step reveals: confidences on the device, ranking on the host (algorithm.md, section 1, points 4 to 6).

A confidence is of one of two distributions: the *base* one, unguided and unfiltered, or the filtered one that the token
is drawn from (algorithm.md, section 1, point 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import kernels
from kernels.transfer import upload
from server.diffusion.sampler import reveal_adaptively, reveal_independently, reveal_most_confident
from server.worker.group import FloatArray, Group, IntArray
from server.worker.pack import Member


@dataclass(frozen=True, slots=True)
class Choice:
    """Response positions that one trajectory reveals, ascending, and their tokens; both (k,) int64."""

    positions: IntArray
    tokens: IntArray


def confidence_kind(member: Member) -> str:
    """Which number ranks a member's candidates: `base` for one of the base distribution, else the name of one of the
    filtered distribution."""
    job = member.trajectory.job
    algorithm = job.diffusion.algorithm
    if algorithm in ("maskgit_plus", "topk_margin", "origin"):
        return algorithm
    if member.step.guided and job.guidance.confidence == "base":
        return "base"
    return "top_probability" if algorithm == "threshold" else "neg_entropy"


def base_confidence(group: Group, phi_0: Tensor, stats: kernels.RowStats) -> Tensor:
    """Confidence (N,) of every row in the base distribution softmax(phi_0 / tau), of which `stats` are: the largest
    probability for `threshold`, minus the entropy for all others."""
    entropies = -stats.entropy_tau
    threshold = [member.trajectory.job.diffusion.algorithm == "threshold" for member in group.members]
    if not any(threshold):
        return entropies
    largest = phi_0.gather(1, stats.argmax[:, None])[:, 0].to(stats.lse_tau.dtype)
    tau = group.row_params(phi_0).tau
    return torch.where(_by_row(group, threshold, None, phi_0), (largest / tau - stats.lse_tau).exp(), entropies)


def confidence(group: Group, state: kernels.Guided, base: Tensor, tokens: Tensor, subset: Tensor | None) -> Tensor:
    """Confidence (n,) of each candidate by its own request's algorithm; `base` (N,) is of all rows in the base
    distribution, `tokens` (n,) are the drawn ones."""
    kinds = [confidence_kind(member) for member in group.members]
    base = base if subset is None else base[subset]
    if set(kinds) <= {"base", "origin"}:
        return base
    asked = tokens
    if "top_probability" in kinds:
        top = state.stats.argmax if subset is None else state.stats.argmax[subset]
        asked = torch.where(_by_row(group, [kind == "top_probability" for kind in kinds], subset, top), top, tokens)
    stats = kernels.filtered_stats(state, asked, rows=subset)
    choices = {
        "base": base,
        "origin": base,
        "neg_entropy": stats.neg_entropy,
        "maskgit_plus": stats.token_probability,
        "top_probability": stats.token_probability,
        "topk_margin": stats.margin,
    }
    if len(set(kinds)) == 1:
        return choices[kinds[0]]
    names = list(choices)
    code = _by_row(group, [names.index(kind) for kind in kinds], subset, base)
    return torch.stack([choices[name] for name in names]).gather(0, code[None])[0]


def _by_row(group: Group, values: Sequence[int | bool], subset: Tensor | None, like: Tensor) -> Tensor:
    """One value a member -> one a candidate row, (n,), on the device of `like`."""
    column = upload(torch.from_numpy(group.repeat(values)), like.device)
    return column if subset is None else column[subset]


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
        elif diffusion.adaptive:
            chosen = reveal_adaptively(conf, drawn == eos_token_id, member.step.least(len(conf)), diffusion)
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


def _candidate_positions(member: Member) -> IntArray:
    inside = (member.positions >= member.step.start) & (member.positions < member.step.stop)
    return member.positions[inside]

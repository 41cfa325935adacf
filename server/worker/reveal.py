"""Which tokens a step reveals: draws and confidences on the device, ranking on the host (algorithm.md, section 1,
points 4 to 6).

A confidence is of one of two distributions: the *base* one, unguided and unfiltered, or the filtered one that the token
is drawn from (point 5).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

import kernels
from kernels.transfer import download, upload
from server.diffusion.sampler import FloatArray, IntArray, reveal
from server.diffusion.schedule import Step
from server.types import ModelInfo
from server.worker.inner import Cohort
from server.worker.pack import Group, Member
from server.worker.trajectory import Trajectory


def _nothing() -> Any:
    return np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Decision:
    """What a step does to one trajectory, on the host: the response positions that it reveals, ascending, and their
    tokens, both (k,) int64.

    `entropy` (n,) in nats is that of softmax(phi_0) at the step's `positions` (n,); `mean_w` is of a guided step, and
    `rewards` are those before each inner step and, where it is traced, once more after the last. With a `failure` it
    reveals nothing, and the trajectory cannot go on: a number was not finite, or memory ran out. For resampling there
    are the total log probability of its tokens in softmax(phi_0), or the best `guesses` (n,) at its positions, int64.
    """

    trajectory: Trajectory
    step: Step
    chosen: IntArray = field(default_factory=_nothing)
    tokens: IntArray = field(default_factory=_nothing)
    positions: IntArray = field(default_factory=_nothing)
    entropy: FloatArray = field(default_factory=_nothing)
    mean_w: float | None = None
    rewards: tuple[float, ...] = ()
    failure: Literal["", "not_finite", "out_of_memory"] = ""
    log_probability: float = 0.0
    guesses: IntArray | None = None


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


def base_confidence(group: Group, phi_0: Tensor, state: kernels.Guided) -> Tensor:
    """Confidence (N,) of every row in the base distribution softmax(phi_0 / tau), for which `state` has just begun: the
    largest probability for `threshold`, minus the entropy for all others."""
    stats = state.stats
    threshold = [member.trajectory.job.diffusion.algorithm == "threshold" for member in group.members]
    if not any(threshold):
        return -stats.entropy_tau
    largest = phi_0.gather(1, stats.argmax[:, None])[:, 0].to(stats.lse_tau.dtype)
    probability = (largest / state.params.tau - stats.lse_tau).exp()
    return torch.where(group.column(threshold), probability, -stats.entropy_tau)


def confidence(group: Group, state: kernels.Guided, base: Tensor, tokens: Tensor, subset: Tensor | None) -> Tensor:
    """Confidence (n,) of each candidate by its own request's algorithm; `base` (N,) is of all rows in the base
    distribution, `tokens` (n,) are the drawn ones."""
    kinds = [confidence_kind(member) for member in group.members]
    base = _of(base, subset)
    if set(kinds) <= {"base", "origin"}:
        return base
    asked = tokens
    if "top_probability" in kinds:
        highest = _of(group.column([kind == "top_probability" for kind in kinds]), subset)
        asked = torch.where(highest, _of(state.stats.argmax, subset), tokens)
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
    code = _of(group.column([names.index(kind) for kind in kinds]), subset)
    return torch.stack(list(choices.values())).gather(0, code[None])[0]


def log_probability(state: kernels.Guided, lse: Tensor, tokens: Tensor, subset: Tensor | None) -> Tensor:
    """Log probability (n,) of each candidate's token in softmax(phi_0), where `lse` (N,) are the rows' normalisers."""
    rows = torch.arange(len(lse), device=lse.device) if subset is None else subset
    return state.logits[rows, tokens].to(lse.dtype) - lse[rows]


def decide(cohort: Cohort, base: Tensor, entropy: Tensor, lse: Tensor, info: ModelInfo) -> list[Decision]:
    """Draw, rank and choose for a cohort, whose N rows have the confidence `base` (N,) in the base distribution, and
    in softmax(phi_0) the entropy `entropy` and the log normaliser `lse`. The mask token is never drawn nor guessed.
    This is where a step reads the device, once."""
    group, state = cohort.group, cohort.state
    candidates = group.candidates()
    subset = None if candidates is None else upload(torch.from_numpy(candidates), group.device)
    drawn = kernels.draw(state, _of(cohort.keys[-1], subset), rows=subset, never=info.mask_token_id)
    ranked = confidence(group, state, base, drawn, subset)
    log_p = guesses = None
    particles = [member.trajectory for member in group.members if member.trajectory.job.guidance.resample is not None]
    if any(trajectory.job.guidance.resampled_by == "confidence" for trajectory in particles):
        log_p = log_probability(state, lse, drawn, subset)
    if any(trajectory.guesses for trajectory in particles):
        guesses = kernels.draw(state.greedy(), cohort.keys[-1], never=info.mask_token_id)
    uniforms = group.ranking_uniforms(cohort.keys[0], subset)
    wanted = drawn, ranked, uniforms, entropy, log_p, guesses, cohort.first_w, *cohort.rewards
    tokens, confidences, uniforms, entropies, log_p, guesses, w, *rewards = download(wanted)
    decisions = []
    stop = row = 0
    for index, member in enumerate(group.members):
        start, stop = stop, stop + len(member.candidates)
        rows, row = slice(row, row + len(member.rows)), row + len(member.rows)
        if not np.isfinite(confidences[start:stop]).all():
            decisions.append(Decision(member.trajectory, member.step, failure="not_finite"))
            continue
        uniform = None if uniforms is None else uniforms[start:stop]
        is_eos = tokens[start:stop] == info.eos_token_id
        chosen = reveal(member.trajectory.job.diffusion, member.step, confidences[start:stop], is_eos, uniform)
        # Rewards after the last inner step are read for traced members; a neighbour's answer does not show it.
        read = group.gradient_steps + member.trajectory.job.trace
        weighed = log_p is not None and member.trajectory.job.guidance.resampled_by == "confidence"
        decisions.append(
            Decision(
                member.trajectory,
                member.step,
                member.positions[member.candidates[chosen]],
                tokens[start:stop][chosen],
                member.positions,
                entropies[rows],
                None if w is None else float(w[rows].mean()),
                tuple(float(reward[index]) for reward in rewards[:read]),
                log_probability=float(log_p[start:stop][chosen].sum(dtype=np.float64)) if weighed else 0.0,
                guesses=guesses[rows] if guesses is not None and member.trajectory.guesses else None,
            )
        )
    return decisions


def _of(values: Tensor, subset: Tensor | None) -> Tensor:
    return values if subset is None else values[subset]

"""Which positions a step reveals, as pure functions on the host (algorithm.md, section 1, points 5 and 6).

Everything here works on one trajectory's few dozen candidate positions, after the step's single device-to-host copy.
Random numbers are arguments.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from server.diffusion.schedule import Step
from server.types import DiffusionParams

FloatArray = npt.NDArray[np.floating]
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]


def rank(confidence: FloatArray, last: BoolArray) -> IntArray:
    """Candidates from most to least confident, shape (n,); those marked `last` (drawn EOS) come after all others,
    among themselves by their own confidence. Equal confidence: the lower position first."""
    order: IntArray = np.lexsort((np.arange(len(confidence)), -confidence, last)).astype(np.int64)
    return order


def perturb(confidence: FloatArray, temperature: float, uniforms: FloatArray) -> FloatArray:
    """Confidence / a + Gumbel noise: its k largest are k draws without replacement from softmax(confidence / a).

    `uniforms` in [0, 1), one a candidate. (The Gumbel top-k trick; Kool et al. 2019, arXiv 1903.06059, section 2.)
    """
    tiny = np.finfo(np.float64).tiny
    noise = -np.log(-np.log(np.maximum(uniforms.astype(np.float64), tiny)))
    result: FloatArray = confidence.astype(np.float64) / temperature + noise
    return result


def entropy_bounded(entropies: FloatArray, bound: float) -> int:
    """Size of the largest U among the beginnings of a ranking with  sum of H in U - largest H in U <= bound.

    `entropies` (n,) in nats, in ranking order; `bound` is the paper's gamma. (EB-Sampler; Ben-Hamu et al. 2025, arXiv
    2505.24857: the left side bounds what the tokens drawn together can have to do with each other.) It never falls
    as U grows, and is added up without the largest term rather than subtracting it, which would round it off.
    """
    h = np.maximum(entropies.astype(np.float64), 0.0)  # rounding can push an entropy below 0
    highest = np.maximum.accumulate(h)
    excess = np.cumsum(np.minimum(h[1:], highest[:-1]))
    return min(len(h), 1 + int((excess <= bound).sum()))


def above_threshold(probabilities: FloatArray, threshold: float) -> int:
    """How many at the beginning of a ranking exceed `threshold`; `probabilities` (n,) in ranking order, each the
    largest of its position. (Confidence-aware parallel decoding; Wu et al. 2025, arXiv 2505.22618.)"""
    exceeds = np.minimum(probabilities, 1.0) > threshold  # rounding can push a probability above 1
    return int(np.logical_and.accumulate(exceeds).sum())


def reveal(
    diffusion: DiffusionParams,
    step: Step,
    confidence: FloatArray,
    is_eos: BoolArray,
    uniforms: FloatArray | None = None,
) -> IntArray:
    """Indices of the candidates that a step reveals, in ascending order; arguments (n,), in the candidates' order.

    `origin` reveals each on its own, with the step's probability. All others reveal the most confident, with drawn EOS
    tokens (`is_eos`) last where they are deprioritized: as many as the step says or, for an adaptive algorithm, as its
    rule allows. For `entropy_bound` the confidence is minus the entropy in nats, for `threshold` the largest
    probability. `origin` and `algorithm_temperature` take `uniforms` in [0, 1); ValueError without them.
    """
    if uniforms is None and (diffusion.algorithm == "origin" or diffusion.algorithm_temperature):
        raise ValueError("origin and algorithm_temperature need uniforms")
    if uniforms is not None and diffusion.algorithm == "origin":
        return np.flatnonzero(uniforms < step.probability).astype(np.int64)
    if uniforms is not None and diffusion.algorithm_temperature:
        confidence = perturb(confidence, diffusion.algorithm_temperature, uniforms)
    order = rank(confidence, is_eos & diffusion.deprioritize_eos)
    count = step.reveal
    if diffusion.algorithm == "entropy_bound":
        count = max(step.least(len(order)), entropy_bounded(-confidence[order], diffusion.entropy_bound))
    elif diffusion.algorithm == "threshold":
        count = max(step.least(len(order)), above_threshold(confidence[order], diffusion.confidence_threshold))
    return np.sort(order[:count])

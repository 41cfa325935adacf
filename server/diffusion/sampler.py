"""Which positions a step reveals, as pure functions on the host (algorithm.md, section 1, points 5 and 6).

Everything here works on one trajectory's few dozen candidate positions, after the step's single device-to-host copy.
Random numbers are arguments.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating]
BoolArray = npt.NDArray[np.bool_]
IndexArray = npt.NDArray[np.int64]


def rank(confidence: FloatArray, last: BoolArray) -> IndexArray:
    """Candidates from most to least confident, shape (n,); those marked `last` (drawn EOS) come after all others,
    among themselves by their own confidence. Equal confidence: the lower position first."""
    order: IndexArray = np.lexsort((np.arange(len(confidence)), -confidence, last)).astype(np.int64)
    return order


def perturb(confidence: FloatArray, temperature: float, uniforms: FloatArray) -> FloatArray:
    """Confidence / a + Gumbel noise: its k largest are k draws without replacement from softmax(confidence / a).

    `uniforms` in [0, 1), one a candidate. (The Gumbel top-k trick; Kool et al. 2019, arXiv 1903.06059, section 2.)
    """
    tiny = np.finfo(np.float64).tiny
    noise = -np.log(-np.log(np.maximum(uniforms.astype(np.float64), tiny)))
    result: FloatArray = confidence.astype(np.float64) / temperature + noise
    return result


def reveal_most_confident(
    confidence: FloatArray,
    is_eos: BoolArray,
    count: int,
    *,
    deprioritize_eos: bool,
    algorithm_temperature: float | None = None,
    uniforms: FloatArray | None = None,
) -> IndexArray:
    """Indices of the `count` candidates to reveal, in ascending order.

    With `algorithm_temperature` > 0 they are drawn without replacement from softmax(confidence / a), with
    `uniforms` (n,); drawn EOS tokens are then chosen only when no other candidate is left.
    """
    if algorithm_temperature:
        if uniforms is None:
            raise ValueError("algorithm_temperature needs uniforms")
        confidence = perturb(confidence, algorithm_temperature, uniforms)
    last = is_eos if deprioritize_eos else np.zeros_like(is_eos)
    return np.sort(rank(confidence, last)[:count])


def reveal_independently(uniforms: FloatArray, probability: float) -> IndexArray:
    """`origin`: each candidate on its own with `probability` (1 reveals all, since uniforms are below 1)."""
    return np.flatnonzero(uniforms < probability).astype(np.int64)

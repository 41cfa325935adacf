"""The gradient methods: one formula, one weight a row (algorithm.md, section 2).

e = soft + stopgrad(w * (hard - soft)); a method is its w. Adding a method is adding a row to `WEIGHTS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Weight = Callable[[Tensor, int], Tensor]
"""(entropy (N,) in nats of softmax(phi) at temperature 1, V) -> w (N,) in [0, 1]; no gradient flows through it."""


def _expectation(entropy: Tensor, vocab_size: int) -> Tensor:
    return torch.zeros_like(entropy)


def _aps(entropy: Tensor, vocab_size: int) -> Tensor:
    return torch.ones_like(entropy)


def _entrgi(entropy: Tensor, vocab_size: int) -> Tensor:
    return entropy / math.log(vocab_size)


WEIGHTS: dict[str, Weight] = {
    "expectation": _expectation,  # continuous relaxation: only the soft embedding
    "aps": _aps,  # straight-through: the hard embedding forward, the soft one backward (arXiv 2510.02291)
    "entrgi": _entrgi,  # entropy-weighted mix of both (arXiv 2602.05000, section 4)
}


def draws_hard_tokens(method: str) -> bool:
    """Whether the method's w can be non-zero, so that its hard tokens must be drawn at all."""
    return method != "expectation"

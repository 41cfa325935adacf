"""Keyed, counter-based random numbers: Philox4x32-10 in plain torch integer arithmetic.

A draw must not depend on what else is in the batch, on the device, or on which implementation runs, so there is no
generator state anywhere: a uniform is a pure function of *who* draws (seed, prompt, trajectory) and *when*
(denoising step, inner step, position, rejection round). Philox is Salmon et al., "Parallel Random Numbers: As Easy as
1, 2, 3" (SC'11); the constants and the ten rounds are theirs, and their known-answer vectors are in the tests.

    key     = the 64-bit seed
    counter = (position, step, prompt << 16 | trajectory, inner << 8 | round)

Torch has no unsigned 32-bit arithmetic on every device, so words live in int64 tensors and are masked to 32 bits;
int64 multiplication wraps modulo 2^64, which is exactly the 32 x 32 -> 64 bit product that Philox needs.
"""

from __future__ import annotations

import torch
from torch import Tensor

INNER_FINAL = 255  # the draw that may be revealed (algorithm.md, section 1.4)
INNER_RANK = 254  # the Gumbel noise of `algorithm_temperature`
INNER_ORIGIN = 253  # the independent reveals of `origin`
INNER_RESAMPLE = 252  # the one uniform of a resampling, of trajectory 0 and position 0 (algorithm.md, section 5)

MAX_REJECTIONS = 64  # rejected draws before a row falls back to the inverse CDF over the kept ids, with round 64

PHILOX_ROUNDS = 10
PHILOX_MULTIPLIER_0 = 0xD2511F53
PHILOX_MULTIPLIER_1 = 0xCD9E8D57
PHILOX_WEYL_0 = 0x9E3779B9
PHILOX_WEYL_1 = 0xBB67AE85

_MASK_32 = 0xFFFFFFFF


def row_keys(seed: Tensor, prompt: Tensor, trajectory: Tensor, step: Tensor, inner: Tensor, position: Tensor) -> Tensor:
    """Packs who draws and when into (N, 4) int64: seed, step << 32 | position, prompt << 16 | trajectory, inner << 8.

    All six are int64 tensors of one length N on one device. A seed of 2^63 or more is given in two's complement;
    prompt and trajectory are below 2^16, inner below 2^8, step and position below 2^31.
    """
    place = (step << 32) | (position & _MASK_32)
    return torch.stack([seed, place, (prompt << 16) | trajectory, inner << 8], dim=-1)


def at_inner(keys: Tensor, inner: int | Tensor) -> Tensor:
    """The same keys (N, 4) at another inner step, one for all or one a row, (N,)."""
    keys = keys.clone()
    keys[:, 3] = inner << 8
    return keys


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four 32-bit outputs (int64 tensors in [0, 2^32)) from a counter of four words and a key of two."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        product_0 = c0 * PHILOX_MULTIPLIER_0
        product_1 = c2 * PHILOX_MULTIPLIER_1
        c0, c1, c2, c3 = (
            ((product_1 >> 32) & _MASK_32) ^ c1 ^ k0,
            product_1 & _MASK_32,
            ((product_0 >> 32) & _MASK_32) ^ c3 ^ k1,
            product_0 & _MASK_32,
        )
        k0 = (k0 + PHILOX_WEYL_0) & _MASK_32
        k1 = (k1 + PHILOX_WEYL_1) & _MASK_32
    return c0, c1, c2, c3


def uniform(keys: Tensor, round_: int | Tensor) -> Tensor:
    """One float64 in [0, 1) a key: keys (N, 4) from `row_keys`, `round_` a number below 2^8 (or a tensor that
    broadcasts against (N,)); 53 bits, the first output word being the high one."""
    seed, place, who, when = keys.unbind(-1)
    counter = (place & _MASK_32, (place >> 32) & _MASK_32, who & _MASK_32, (when | round_) & _MASK_32)
    high, low, _, _ = philox(counter, (seed & _MASK_32, (seed >> 32) & _MASK_32))
    return ((high << 21) | (low >> 11)).double() * 2.0**-53

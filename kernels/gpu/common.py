# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""What the kernels share: how they are compiled, how phi is read, Adam's closed form, tile sums, keyed random numbers.

`KIND` says how phi is described (kernels.adam.Trail): 0 the logits, 1 logits and g_1, 2 logits, g_1 and g_2, 3 phi
itself. Pointers that a kind does not use are never read. Row numbers are int64: N V passes 2^31 at N = 14,000.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from kernels import adam
from kernels.ops import BETA_1, BETA_2, EPSILON

# Constants stand to the right of tensors: in the interpreter a tl.constexpr on the left would swallow the tensor.
EPS: tl.constexpr = tl.constexpr(EPSILON)
M2: tl.constexpr = tl.constexpr(adam.coefficients(2, BETA_1))
V2: tl.constexpr = tl.constexpr(adam.coefficients(2, BETA_2))

REACH: tl.constexpr = tl.constexpr(1.01)
"""No Adam step is longer than this many eta: |m_hat| / sqrt(v_hat) is below 1.006 up to the third (Cauchy-Schwarz)."""

COUNTS = {"rows", "plane", "count", "drawn", "blocks", "never"}
COLUMNS = {"tau", "eta", "top_p", "top_k", "greedy", "row_maximum", "row_s_1", "row_s_tau", "entropy_tau", "argmax"}
INDICES = {"keys", "index", "tokens", "place", "w", "offset", "sums"}


def kernel(function: Callable[..., None]) -> Any:
    """`triton.jit` for what is launched. Triton compiles a kernel anew for each set of arguments that are 1, or
    multiples of 16; what differs from batch to batch (the number of rows, and where a row's parameters begin in memory)
    gives no such hints, so that all forms are known when the server starts. V, D and strides, which a model fixes, do,
    and make loads wide."""
    varying = (COUNTS | COLUMNS | INDICES) & inspect.signature(function).parameters.keys()
    return triton.jit(do_not_specialize=sorted(varying))(function)


@triton.jit
def direction_1(g):
    """Adam's direction after one update: g / (|g| + eps)."""
    return g / (tl.abs(g) + EPS)


@triton.jit
def direction_2(a, g):
    """After two updates, oldest gradient first."""
    return (a * M2[0] + g * M2[1]) / (tl.sqrt(a * a * V2[0] + g * g * V2[1]) + EPS)


@triton.jit
def load_phi(source, columns, mask, KIND: tl.constexpr):
    """phi at `columns` of a row in float32, -inf where `mask` is false. `source` is (logits, g1, g2, phi, row,
    row_stride, vocab, eta); row and columns are int64 and broadcast."""
    logits, g1, g2, phi, row, row_stride, vocab, eta = source
    at = row * vocab + columns
    if KIND == 3:
        x = tl.load(phi + at, mask=mask, other=0.0)
    else:
        x = tl.load(logits + row * row_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if (KIND == 1) | (KIND == 2):
        a = tl.load(g1 + at, mask=mask, other=0.0).to(tl.float32)
        x = x + eta * direction_1(a)
        if KIND == 2:
            b = tl.load(g2 + at, mask=mask, other=0.0).to(tl.float32)
            x = x + eta * direction_2(a, b)
    return tl.where(mask, x, -float("inf"))


@triton.jit
def block(source, start, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """The ids from `start` on, and phi there."""
    columns = start + tl.arange(0, BLOCK).to(tl.int64)
    return columns, load_phi(source, columns, columns < source[6], KIND)


@triton.jit
def value_at(source, column, KIND: tl.constexpr):
    """phi at one place, as a scalar."""
    return tl.sum(block(source, column, KIND, 1)[1], 0)


@triton.jit
def exponential_sums(x, maximum, inverse_tau):
    """Along axis 1 of x (R, W): sum exp(z) and sum z exp(z) with z = (x - maximum) inverse_tau; -inf counts as nothing.

    `maximum` and `inverse_tau` broadcast as (R, 1).
    """
    z = (x - maximum) * inverse_tau
    w = tl.exp(z)
    return tl.sum(w, 1), tl.sum(tl.where(w == 0.0, 0.0, w * z), 1)


@triton.jit
def tile_sums(x, inverse_tau):
    """Maximum along axis 1 of x (R, W) and the four sums relative to it, in the order of `kernels.tiled.Tiles`; an all
    -inf row has zeros."""
    maximum = tl.max(x, 1)
    safe = tl.where(maximum == -float("inf"), 0.0, maximum)[:, None]
    s_1, t_1 = exponential_sums(x, safe, 1.0)
    s_tau, t_tau = exponential_sums(x, safe, inverse_tau)
    return maximum, s_1, t_1, s_tau, t_tau


@triton.jit
def store_tiles(tiles, plane, at, mask, sums):
    """Writes tile sums into the five planes of `tiles`, `plane` elements apart."""
    for k in tl.static_range(5):
        tl.store(tiles + k * plane + at, sums[k], mask=mask)


@triton.jit
def uniform(keys, row, rejections):
    """kernels.random.uniform for one key, float64: Philox4x32-10 with the round in the low byte of the last word."""
    seed = tl.load(keys + row * 4)
    place = tl.load(keys + row * 4 + 1)
    who = tl.load(keys + row * 4 + 2)
    when = tl.load(keys + row * 4 + 3)
    c0 = (place & 0xFFFFFFFF).to(tl.uint32)
    c1 = ((place >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c2 = (who & 0xFFFFFFFF).to(tl.uint32)
    c3 = ((when | rejections) & 0xFFFFFFFF).to(tl.uint32)
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    # philox_impl is triton's own ten rounds of the same generator, and takes counter and key words as they are.
    c0, c1, c2, c3 = tl.philox_impl(c0, c1, c2, c3, k0, k1, 10)
    bits = (c0.to(tl.int64) << 21) | (c1.to(tl.int64) >> 11)
    return bits.to(tl.float64) * (2.0**-53)

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Drawing without a sort: one token a row from softmax(filter(phi / tau)) by the rejection rule of algorithm.md 1.4.

A draw picks a tile by the cumulative tile masses, rescans that one tile, and verifies the token in one pass: it is
kept when the mass and the count of what ranks above it are small enough. What is kept is a prefix of the ranking, so
a rejected token also rejects everything that ranks below it, and later rounds mostly need no pass. Rows that reject 64
tokens (hard top_k on a flat row) are left to `kernels.gpu.kept`. One program a row, no host synchronisation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.common import block, kernel, uniform, value_at
from kernels.random import MAX_REJECTIONS

ROUNDS: tl.constexpr = tl.constexpr(MAX_REJECTIONS)
INF: tl.constexpr = tl.constexpr(float("inf"))


@triton.jit
def _invert(
    u, total, source, mass, tile_count, maximum, inverse_tau, highest,
    KIND: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The first id whose cumulative unfiltered mass exceeds u times the total (int64 scalar)."""
    mass += source[4] * tile_count
    target = u * total
    base = total * 0.0
    passed = tl.zeros([TILES], tl.int32)
    for start in range(0, tile_count, TILES):
        j = start + tl.arange(0, TILES)
        share = tl.load(mass + j, mask=j < tile_count, other=0.0).to(tl.float64)
        cumulative = base + tl.cumsum(share, 0)
        passed += ((cumulative <= target) & (j < tile_count)).to(tl.int32)
        base += tl.sum(share, 0)
    tile = tl.minimum(tl.sum(passed, 0), tile_count - 1)
    below = tl.zeros([TILES], tl.float64)
    for start in range(0, tile_count, TILES):
        j = start + tl.arange(0, TILES)
        below += tl.load(mass + j, mask=j < tile, other=0.0).to(tl.float64)
    place = tl.arange(0, TILE)
    x = block(source, tile.to(tl.int64) * TILE, KIND, TILE)[1]
    weight = tl.exp((x - maximum) * inverse_tau)
    cumulative = tl.sum(below, 0) + tl.cumsum(weight.to(tl.float64), 0)
    first = tl.sum((cumulative <= target).to(tl.int32), 0)
    # Rounding can leave the tile's end at the target: then the last id with any mass.
    last = tl.max(tl.where(weight > 0, place, -1), 0)
    chosen = tl.where(first < TILE, first, last)
    return tl.where(last < 0, highest, tl.minimum(tile.to(tl.int64) * TILE + chosen, source[6] - 1))


@triton.jit
def _best_other(never, source, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """The lowest id of the largest value beside `never` (int64 scalar)."""
    vocab = source[6]
    highest = tl.full([BLOCK], -INF, tl.float32)
    found = tl.full([BLOCK], 0, tl.int64) + vocab
    for start in range(0, vocab, BLOCK):
        columns, x = block(source, start, KIND, BLOCK)
        better = (columns < vocab) & (columns != never) & ((x > highest) | (found == vocab))
        highest = tl.where(better, x, highest)
        found = tl.where(better, columns, found)
    return tl.minimum(tl.min(tl.where(highest == tl.max(highest, 0), found, vocab), 0), vocab - 1)


@triton.jit
def _above(value, token, source, maximum, inverse_tau, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Mass (float64) and count of what ranks above a token of this value."""
    mass = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, source[6], BLOCK):
        columns, x = block(source, start, KIND, BLOCK)
        above = (x > value) | ((x == value) & (columns < token))
        mass += tl.where(above, tl.exp((x - maximum) * inverse_tau), 0.0)
        count += above.to(tl.int32)
    return tl.sum(mass.to(tl.float64), 0), tl.sum(count, 0)


@kernel
def draw(
    logits, g1, g2, phi, tau, top_p, top_k, greedy, eta, row_maximum, row_s_tau, mass, argmax, keys, index, tokens,
    never, vocab, row_stride, tile_count,
    KIND: tl.constexpr, HAS_INDEX: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (n,): row `index[i]` (or i) draws with key i; an id `never` (-1: none) is not accepted. What is still
    rejected after all rounds is left to `draw_kept` as -1 less the best id that may be taken."""
    i = tl.program_id(0).to(tl.int64)
    row = i
    if HAS_INDEX:
        row = tl.load(index + i)
    source = logits, g1, g2, phi, row, row_stride, vocab, tl.load(eta + row)
    inverse_tau = 1.0 / tl.load(tau + row)
    maximum = tl.load(row_maximum + row)
    total = tl.load(row_s_tau + row)
    p = tl.load(top_p + row)
    k = tl.load(top_k + row)
    highest = tl.load(argmax + row)
    limit = tl.where(p >= 1.0, INF, p.to(tl.float64) * total)
    # One kept token needs no draw: the second is cut when the first alone (mass 1) exceeds top_p.
    done = ((tl.load(greedy + row) != 0) | (k == 1) | (limit < 1.0)).to(tl.int32)
    if highest == never:
        highest = _best_other(never, source, KIND, BLOCK)
    token = tl.where(done != 0, highest, -1 - highest)
    bound_value = -INF + maximum * 0.0
    bound_token = highest * 0 + vocab
    rejections = done * 0
    while (done == 0) & (rejections < ROUNDS):
        u = uniform(keys, i, rejections)
        x = _invert(u, total, source, mass, tile_count, maximum, inverse_tau, highest, KIND, TILE, TILES)
        value = value_at(source, x, KIND)
        if (x != never) & ((value > bound_value) | ((value == bound_value) & (x < bound_token))):
            above, count = _above(value, x, source, maximum, inverse_tau, KIND, BLOCK)
            if (count == 0) | ((above <= limit) & (count < k)):
                token = x
                done = done + 1
            else:
                bound_value = value
                bound_token = x
        rejections += 1
    tl.store(tokens + i, token)

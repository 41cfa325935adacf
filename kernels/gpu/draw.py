# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Drawing without a sort, and statistics of the filtered distribution. One program a row, no host synchronisation.

    draw:            one token from softmax(filter(phi / tau)) by the rejection rule of algorithm.md 1.4
    filtered_stats:  minus the entropy, the token's probability and the top-two margin of that distribution

A draw picks a tile by the cumulative tile masses, rescans that one tile, and verifies the token in one pass: it is
kept when the mass and the count of what ranks above it are small enough. What is kept is a prefix of the ranking, so
a rejected token also rejects everything that ranks below it, and later rounds mostly need no pass. After 64
rejections (hard top_k on a flat row), and for the statistics, the last kept rank is found exactly by bisection on the
bits of the value, which takes some thirty passes over a row that the L2 cache holds.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.common import load_phi, uniform
from kernels.random import MAX_REJECTIONS

ROUNDS: tl.constexpr = tl.constexpr(MAX_REJECTIONS)
INF: tl.constexpr = tl.constexpr(float("inf"))
LOWEST: tl.constexpr = tl.constexpr(-2139095041)  # -infinity as an integer in the order of floats


@triton.jit
def _block(source, start, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """The ids from `start` on, and phi there."""
    columns = start + tl.arange(0, BLOCK).to(tl.int64)
    return columns, load_phi(source, columns, columns < source[6], KIND)


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
    x = _block(source, tile.to(tl.int64) * TILE, KIND, TILE)[1]
    weight = tl.exp((x - maximum) * inverse_tau)
    cumulative = tl.sum(below, 0) + tl.cumsum(weight.to(tl.float64), 0)
    first = tl.sum((cumulative <= target).to(tl.int32), 0)
    # Rounding can leave the tile's end at the target: then the last id with any mass.
    last = tl.max(tl.where(weight > 0, place, -1), 0)
    chosen = tl.where(first < TILE, first, last)
    return tl.where(last < 0, highest, tl.minimum(tile.to(tl.int64) * TILE + chosen, source[6] - 1))


@triton.jit
def _value(source, column, KIND: tl.constexpr):
    """phi at one place, as a scalar."""
    return tl.sum(_block(source, column, KIND, 1)[1], 0)


@triton.jit
def _best_other(never, source, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """The lowest id of the largest value beside `never` (int64 scalar)."""
    vocab = source[6]
    highest = tl.full([BLOCK], -INF, tl.float32)
    found = tl.full([BLOCK], 0, tl.int64) + vocab
    for start in range(0, vocab, BLOCK):
        columns, x = _block(source, start, KIND, BLOCK)
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
        columns, x = _block(source, start, KIND, BLOCK)
        above = (x > value) | ((x == value) & (columns < token))
        mass += tl.where(above, tl.exp((x - maximum) * inverse_tau), 0.0)
        count += above.to(tl.int32)
    return tl.sum(mass.to(tl.float64), 0), tl.sum(count, 0)


@triton.jit
def _flip(bits):
    """Bits of floats, as integers in the same order; and back again."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _last_kept(limit, top_k, source, maximum, inverse_tau, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """(value, id) of the lowest kept rank.

    "The mass above a value is at most the limit and its count below top_k" is monotone in the value: bisection finds
    the smallest such bit pattern, which is the value of the last kept token. Among its equals the lower ids are kept,
    as many as mass and count allow.
    """
    low = tl.full([], LOWEST, tl.int64)
    high = _flip(maximum.to(tl.int32, bitcast=True)).to(tl.int64)
    mass = tl.full([], 0.0, tl.float64)
    count = tl.full([], 0, tl.int32)
    while low < high:
        middle = (low + high) >> 1
        value = _flip(middle.to(tl.int32)).to(tl.float32, bitcast=True)
        heavier, more = _above(value, 0, source, maximum, inverse_tau, KIND, BLOCK)
        open_ = (more == 0) | ((heavier <= limit) & (more < top_k))
        high = tl.where(open_, middle, high)
        low = tl.where(open_, low, middle + 1)
        mass = tl.where(open_, heavier, mass)
        count = tl.where(open_, more, count)

    value = _flip(high.to(tl.int32)).to(tl.float32, bitcast=True)
    weight = tl.exp((value - maximum) * inverse_tau)
    slack = (limit - mass).to(tl.float32)
    room = tl.where(weight > 0, tl.minimum(slack / tl.where(weight > 0, weight, 1.0), 4e9), 4e9).to(tl.int64) + 1
    wanted = tl.maximum(tl.minimum(room, top_k - count), 1)

    seen = wanted * 0
    last = wanted * 0
    for start in range(0, source[6], BLOCK):
        columns, x = _block(source, start, KIND, BLOCK)
        same = (columns < source[6]) & (x == value)
        order = seen + tl.cumsum(same.to(tl.int32), 0)
        last = tl.maximum(last, tl.max(tl.where(same & (order <= wanted), columns, 0), 0))
        seen += tl.sum(same.to(tl.int32), 0)
    return value, last


@triton.jit
def _keeps(x, columns, value, last):
    """Whether the filters keep ids of value x, the lowest kept rank being (value, last)."""
    return (x > value) | ((x == value) & (columns <= last))


@triton.jit
def _acceptable(
    start, source, value, last, never, best, inverse_tau, KIND: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The ids from `start` on and their weights, zero for `never` and what the filters drop. They are relative to
    `best`, the largest that counts: what `never` leaves to the others may be too small for a number."""
    columns, x = _block(source, start, KIND, BLOCK)
    inside = _keeps(x, columns, value, last) & (columns != never)
    return columns, tl.where(inside, tl.exp((x - best) * inverse_tau), 0.0)


@triton.jit
def draw(
    logits, g1, g2, phi, tau, top_p, top_k, greedy, eta, row_maximum, row_s_tau, mass, argmax, keys, index, tokens,
    never, vocab, row_stride, tile_count,
    KIND: tl.constexpr, HAS_INDEX: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (n,): row `index[i]` (or i) draws with key i; an id `never` (-1: none) is not accepted."""
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
    token = highest
    bound_value = -INF + maximum * 0.0
    bound_token = highest * 0 + vocab
    rejections = done * 0
    while (done == 0) & (rejections < ROUNDS):
        u = uniform(keys, i, rejections)
        x = _invert(u, total, source, mass, tile_count, maximum, inverse_tau, highest, KIND, TILE, TILES)
        value = _value(source, x, KIND)
        if (x != never) & ((value > bound_value) | ((value == bound_value) & (x < bound_token))):
            above, count = _above(value, x, source, maximum, inverse_tau, KIND, BLOCK)
            if (count == 0) | ((above <= limit) & (count < k)):
                token = x
                done = done + 1
            else:
                bound_value = value
                bound_token = x
        rejections += 1
    if done == 0:
        value, last = _last_kept(limit, k, source, maximum, inverse_tau, KIND, BLOCK)
        best = _value(source, highest, KIND)
        best = tl.where(best == -INF, 0.0, best)
        kept = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab, BLOCK):
            kept += _acceptable(start, source, value, last, never, best, inverse_tau, KIND, BLOCK)[1]
        target = uniform(keys, i, rejections) * tl.sum(kept.to(tl.float64), 0)
        base = target * 0.0
        chosen = highest * 0 + vocab
        fallback = highest * 0 - 1
        for start in range(0, vocab, BLOCK):
            columns, weight = _acceptable(start, source, value, last, never, best, inverse_tau, KIND, BLOCK)
            cumulative = base + tl.cumsum(weight.to(tl.float64), 0)
            hit = (cumulative > target) & (weight > 0)
            chosen = tl.minimum(chosen, tl.min(tl.where(hit, columns, vocab), 0))
            fallback = tl.maximum(fallback, tl.max(tl.where(weight > 0, columns, -1), 0))
            base += tl.sum(weight.to(tl.float64), 0)
        token = tl.where(chosen < vocab, chosen, tl.where(fallback < 0, highest, fallback))
    tl.store(tokens + i, token)


@triton.jit
def filtered_stats(
    logits, g1, g2, phi, tau, top_p, top_k, eta, row_maximum, row_s_tau, argmax, tokens, index, out,
    drawn, vocab, row_stride,
    KIND: tl.constexpr, HAS_INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (n,); `out` is (3, n)."""
    i = tl.program_id(0).to(tl.int64)
    row = i
    if HAS_INDEX:
        row = tl.load(index + i)
    source = logits, g1, g2, phi, row, row_stride, vocab, tl.load(eta + row)
    inverse_tau = 1.0 / tl.load(tau + row)
    maximum = tl.load(row_maximum + row)
    p = tl.load(top_p + row)
    highest = tl.load(argmax + row)
    limit = tl.where(p >= 1.0, INF, p.to(tl.float64) * tl.load(row_s_tau + row))
    value, last = _last_kept(limit, tl.load(top_k + row), source, maximum, inverse_tau, KIND, BLOCK)
    s = tl.zeros([BLOCK], tl.float32)
    t = tl.zeros([BLOCK], tl.float32)
    second = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        columns, x = _block(source, start, KIND, BLOCK)
        z = (x - maximum) * inverse_tau
        weight = tl.where(_keeps(x, columns, value, last), tl.exp(z), 0.0)
        s += weight
        t += tl.where(weight == 0.0, 0.0, weight * z)
        second = tl.maximum(second, tl.where(columns == highest, 0.0, weight))
    kept = tl.sum(s.to(tl.float64), 0).to(tl.float32)
    token = tl.load(tokens + i)
    own = _value(source, token, KIND)
    own_weight = tl.where(_keeps(own, token, value, last), tl.exp((own - maximum) * inverse_tau), 0.0)
    tl.store(out + i, tl.sum(t.to(tl.float64), 0).to(tl.float32) / kept - tl.log(kept))
    tl.store(out + drawn + i, own_weight / kept)
    tl.store(out + 2 * drawn + i, (1.0 - tl.max(second, 0)) / kept)

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""What needs the exact end of the kept ranks: statistics of the filtered distribution, and draws after 64 rejections.

    filtered_stats:  minus the entropy, the token's probability and the top-two margin of that distribution
    draw_kept:       a token for rows that `draw` has left without one, from the kept ids themselves

One program a row, no sort, no host synchronisation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.common import block, kernel, uniform, value_at
from kernels.random import MAX_REJECTIONS

ROUNDS: tl.constexpr = tl.constexpr(MAX_REJECTIONS)
INF: tl.constexpr = tl.constexpr(float("inf"))
LOWEST: tl.constexpr = tl.constexpr(-2139095041)  # -infinity as an integer in the order of floats
PIVOTS: tl.constexpr = tl.constexpr(16)  # values that one pass compares a row with
NARROW: tl.constexpr = tl.constexpr(256)  # columns at a time, then
UNDERFLOW: tl.constexpr = tl.constexpr(104.0)  # exp of minus this is zero in float32


@triton.jit
def _flip(bits):
    """Bits of floats, as integers in the same order; and back again."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _as_bits(value):
    """A float as an integer (int64) in the order of floats."""
    return _flip(value.to(tl.int32, bitcast=True)).to(tl.int64)


@triton.jit
def _asvalue_at(bits):
    """The float of such an integer."""
    return _flip(bits.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _least(limit, top_k, total, entropy, peaks, tile_count, maximum, tau, vocab, TILES: tl.constexpr):
    """A value that the last kept rank is not below. If it lies z under the maximum, in units of tau, then

        (1 - p) total <= mass from it down <= V exp(-z)    and, by Markov's inequality, (1 - p) total <= mean total / z

    with `mean` the mean depth under q, entropy - log total; and of T tiles, each with its own maximum, T ids are at or
    above the least one.
    """
    depth = UNDERFLOW + total.to(tl.float32) * 0.0
    if limit < INF:
        cut = tl.maximum((1.0 - limit / total).to(tl.float32), 1e-30)
        mean = entropy - tl.log(total.to(tl.float32)) + 1e-4  # rounding
        depth = tl.minimum(tl.log(vocab / (cut * total.to(tl.float32))), mean / cut) * 1.001 + 1e-3
        depth = tl.where((depth > 0) & (depth < UNDERFLOW), depth, UNDERFLOW)
    value = tl.where(limit < INF, maximum - depth * tau, -INF)
    if top_k <= tile_count:
        least = tl.full([TILES], INF, tl.float32)
        for start in range(0, tile_count, TILES):
            j = start + tl.arange(0, TILES)
            least = tl.minimum(least, tl.load(peaks + j, mask=j < tile_count, other=INF))
        value = tl.where(top_k < vocab, tl.maximum(value, tl.min(least, 0)), value)
    return value


@triton.jit
def _last_kept(
    limit, top_k, total, entropy, peaks, tile_count, scratch, source, maximum, tau,
    KIND: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, SCRATCH: tl.constexpr,
):  # fmt: skip
    """(value, id) of the lowest kept rank; (-inf, V) where nothing is filtered.

    "The mass above a value is at most the limit and its count below top_k" is monotone in the value, so the last kept
    token has the least value for which it holds. Each pass over the row asks it of `PIVOTS` values at once. When at
    most SCRATCH ids can still be the one (or all of them are equal), one more pass writes them down, and they are
    searched bit by bit where they are. Three passes to get there divide the range by 4,096, which leaves hundreds of
    ids of a continuous row; equal values are told apart by id, as many being kept as mass and count allow.
    """
    vocab = source[6]
    inverse_tau = 1.0 / tau
    value = -INF + maximum * 0.0
    last = vocab + top_k * 0
    if (limit < INF) | (top_k < vocab):
        high = _as_bits(maximum)
        low = _as_bits(_least(limit, top_k, total, entropy, peaks, tile_count, maximum, tau, vocab, TILES))
        low = tl.minimum(low, high)
        mass = tl.full([], 0.0, tl.float64)  # of what is above `high`
        count = tl.full([], 0, tl.int32)  # of the same
        left = tl.full([], 0, tl.int32) + vocab  # ids from `low` to `high`, at most
        passes = tl.full([], 0, tl.int32)
        j = tl.arange(0, PIVOTS)
        while (low < high) & (left > SCRATCH) & (passes < 64):
            # Evenly spaced values, and the middle of the bits, which alone would end the search some day.
            top = _asvalue_at(high)
            bottom = tl.maximum(_asvalue_at(low), top - UNDERFLOW * tau)
            even = _as_bits(bottom + (top - bottom) * (j.to(tl.float32) / PIVOTS))
            pivots = tl.where(j == 0, (low + high) >> 1, even)
            pivots = tl.maximum(tl.minimum(pivots, high - 1), low)
            against = _asvalue_at(pivots)
            heavier = tl.zeros([NARROW, PIVOTS], tl.float32)
            more = tl.zeros([NARROW, PIVOTS], tl.int32)
            for start in range(0, vocab, NARROW):
                columns, x = block(source, start, KIND, NARROW)
                above = x[:, None] > against[None, :]
                heavier += tl.where(above, tl.exp((x - maximum) * inverse_tau)[:, None], 0.0)
                more += above.to(tl.int32)
            masses = tl.sum(heavier.to(tl.float64), 0)
            counts = tl.sum(more, 0)
            open_ = (counts == 0) | ((masses <= limit) & (counts < top_k))
            closed = tl.max(tl.where(open_, LOWEST - 1, pivots), 0)
            least_open = tl.min(tl.where(open_, pivots, high), 0)
            before = count
            if least_open < high:
                mass = tl.max(tl.where(pivots == least_open, masses, 0.0), 0)
                count = tl.max(tl.where(pivots == least_open, counts, 0), 0)
            above_low = tl.max(tl.where(pivots == closed, counts, 0), 0)
            left = tl.where(closed < LOWEST, left + before, above_low) - count
            low = tl.maximum(low, closed + 1)
            high = least_open
            passes += 1

        # Pivots tell -0 from 0 and comparisons of floats do not: both are 0 from here on.
        low = tl.where(low == -1, 0, low)
        high = tl.where(high == -1, 0, high)
        bottom = _asvalue_at(low)
        top = _asvalue_at(high)
        seen = tl.full([], 0, tl.int32)
        for start in range(0, vocab, BLOCK):
            columns, x = block(source, start, KIND, BLOCK)
            candidate = (columns < vocab) & (x >= bottom) & (x <= top)
            at = seen + tl.cumsum(candidate.to(tl.int32), 0) - 1
            fits = candidate & (at < SCRATCH)
            tl.store(scratch + 2 * at, _as_bits(tl.where(x == 0.0, 0.0, x)).to(tl.int32), mask=fits)  # -0 equals 0
            tl.store(scratch + 2 * at + 1, columns.to(tl.int32), mask=fits)
            seen += tl.sum(candidate.to(tl.int32), 0)
        tl.debug_barrier()  # the program reads what all of its threads have written
        s = tl.arange(0, SCRATCH)
        ordered = tl.load(scratch + 2 * s, mask=s < seen, other=LOWEST)
        ids = tl.load(scratch + 2 * s + 1, mask=s < seen, other=0)
        weight = tl.where(s < seen, tl.exp((_asvalue_at(ordered) - maximum) * inverse_tau), 0.0)
        above_mass = mass
        above_count = count
        while low < high:
            middle = (low + high) >> 1
            more = count + tl.sum((ordered > middle).to(tl.int32), 0)
            heavier = mass + tl.sum(tl.where(ordered > middle, weight, 0.0), 0).to(tl.float64)
            open_ = (more == 0) | ((heavier <= limit) & (more < top_k))
            high = tl.where(open_, middle, high)
            low = tl.where(open_, low, middle + 1)
            above_mass = tl.where(open_, heavier, above_mass)
            above_count = tl.where(open_, more, above_count)

        value = _asvalue_at(high)
        one = tl.exp((value - maximum) * inverse_tau)
        slack = (limit - above_mass).to(tl.float32)
        room = tl.where(one > 0, tl.minimum(slack / tl.where(one > 0, one, 1.0), 4e9), 4e9).to(tl.int64) + 1
        wanted = tl.maximum(tl.minimum(room, top_k - above_count), 1)
        same = (s < seen) & (ordered == high)
        order = tl.cumsum(same.to(tl.int32), 0)
        last = tl.max(tl.where(same & (order <= wanted), ids, 0), 0).to(tl.int64)
        if (seen > SCRATCH) & (wanted > SCRATCH):
            # More equal values than there is room for: they are counted where they are.
            passed = wanted * 0
            for start in range(0, vocab, BLOCK):
                columns, x = block(source, start, KIND, BLOCK)
                equal = (columns < vocab) & (x == value)
                place = passed + tl.cumsum(equal.to(tl.int32), 0)
                last = tl.maximum(last, tl.max(tl.where(equal & (place <= wanted), columns, 0), 0))
                passed += tl.sum(equal.to(tl.int32), 0)
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
    columns, x = block(source, start, KIND, BLOCK)
    inside = _keeps(x, columns, value, last) & (columns != never)
    return columns, tl.where(inside, tl.exp((x - best) * inverse_tau), 0.0)


@kernel
def draw_kept(
    logits, g1, g2, phi, tau, top_p, top_k, eta, row_maximum, row_s_tau, entropy_tau, tiles, keys, index, tokens,
    scratch, never, vocab, row_stride, tile_count,
    KIND: tl.constexpr, HAS_INDEX: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, SCRATCH: tl.constexpr,
):  # fmt: skip
    """Grid (n,), after `draw`: rows without a token draw once more among what their filters keep. A kernel of its own,
    because the search takes most of a multiprocessor's registers. `scratch` is (n, SCRATCH, 2) int32."""
    i = tl.program_id(0).to(tl.int64)
    left = tl.load(tokens + i)
    if left < 0:
        row = i
        if HAS_INDEX:
            row = tl.load(index + i)
        highest = -1 - left
        source = logits, g1, g2, phi, row, row_stride, vocab, tl.load(eta + row)
        own_tau = tl.load(tau + row)
        inverse_tau = 1.0 / own_tau
        maximum = tl.load(row_maximum + row)
        total = tl.load(row_s_tau + row)
        p = tl.load(top_p + row)
        value, last = _last_kept(
            tl.where(p >= 1.0, INF, p.to(tl.float64) * total), tl.load(top_k + row), total, tl.load(entropy_tau + row),
            tiles + row * tile_count, tile_count, scratch + i * SCRATCH * 2, source, maximum, own_tau,
            KIND, BLOCK, TILES, SCRATCH,
        )  # fmt: skip
        best = value_at(source, highest, KIND)
        best = tl.where(best == -INF, 0.0, best)
        kept = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab, BLOCK):
            kept += _acceptable(start, source, value, last, never, best, inverse_tau, KIND, BLOCK)[1]
        target = uniform(keys, i, ROUNDS) * tl.sum(kept.to(tl.float64), 0)
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
        tl.store(tokens + i, tl.where(chosen < vocab, chosen, tl.where(fallback < 0, highest, fallback)))


@kernel
def filtered_stats(
    logits, g1, g2, phi, tau, top_p, top_k, eta, row_maximum, row_s_tau, entropy_tau, argmax, tiles,
    tokens, index, out, scratch,
    drawn, vocab, row_stride, tile_count,
    KIND: tl.constexpr, HAS_INDEX: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
    SCRATCH: tl.constexpr,
):  # fmt: skip
    """Grid (n,); `out` is (3, n), `scratch` (n, SCRATCH, 2) int32. A row that nothing filters takes no pass: its tiles
    know all but the largest two values of one of them."""
    i = tl.program_id(0).to(tl.int64)
    row = i
    if HAS_INDEX:
        row = tl.load(index + i)
    source = logits, g1, g2, phi, row, row_stride, vocab, tl.load(eta + row)
    own_tau = tl.load(tau + row)
    inverse_tau = 1.0 / own_tau
    maximum = tl.load(row_maximum + row)
    total = tl.load(row_s_tau + row)
    entropy = tl.load(entropy_tau + row)
    highest = tl.load(argmax + row)
    p = tl.load(top_p + row)
    k = tl.load(top_k + row)
    limit = tl.where(p >= 1.0, INF, p.to(tl.float64) * total)
    peaks = tiles + row * tile_count
    value, last = _last_kept(
        limit, k, total, entropy, peaks, tile_count, scratch + i * SCRATCH * 2, source, maximum, own_tau,
        KIND, BLOCK, TILES, SCRATCH,
    )  # fmt: skip
    kept = total.to(tl.float32)
    neg_entropy = -entropy
    if last < vocab:
        s = tl.zeros([BLOCK], tl.float32)
        t = tl.zeros([BLOCK], tl.float32)
        seconds = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab, BLOCK):
            columns, x = block(source, start, KIND, BLOCK)
            z = (x - maximum) * inverse_tau
            weight = tl.where(_keeps(x, columns, value, last), tl.exp(z), 0.0)
            s += weight
            t += tl.where(weight == 0.0, 0.0, weight * z)
            seconds = tl.maximum(seconds, tl.where(columns == highest, 0.0, weight))
        kept = tl.sum(s.to(tl.float64), 0).to(tl.float32)
        neg_entropy = tl.sum(t.to(tl.float64), 0).to(tl.float32) / kept - tl.log(kept)
        second = tl.max(seconds, 0)
    else:
        best = highest // TILE
        others = tl.full([TILES], -INF, tl.float32)
        for start in range(0, tile_count, TILES):
            j = start + tl.arange(0, TILES)
            others = tl.maximum(others, tl.load(peaks + j, mask=(j < tile_count) & (j != best), other=-INF))
        ids, values = block(source, best * TILE, KIND, TILE)
        other = tl.maximum(tl.max(others, 0), tl.max(tl.where(ids == highest, -INF, values), 0))
        second = tl.exp((other - maximum) * inverse_tau)
    token = tl.load(tokens + i)
    own = value_at(source, token, KIND)
    own_weight = tl.where(_keeps(own, token, value, last), tl.exp((own - maximum) * inverse_tau), 0.0)
    tl.store(out + i, neg_entropy)
    tl.store(out + drawn + i, own_weight / kept)
    tl.store(out + 2 * drawn + i, (1.0 - second) / kept)

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Row statistics: one pass of tile sums, then a small combination of each row's tiles.

    row_sums:  tiles[:, n, j] = (max, sum e^d, sum d e^d at temperature 1 and at tau) over tile j of phi[n]
    combine:   lse, entropy, argmax and the tiles' shares of the mass from them   (kernels.tiled.combine in torch)

After a fused update `combine` also adds up the weights that it wrote (`SOFT`). They are relative to the most that phi
can have become, so that they were known before its maximum was. Rows that can move by more than `steep` temperatures,
where such weights could be too small for their dtype, have them written anew here, relative to the maximum.

Replaces two softmaxes, two entropies and an argmax over (N, V): phi is read once and nothing of that size is written.
"""

from __future__ import annotations

import triton.language as tl

from kernels.gpu.common import kernel, load_phi, store_tiles, tile_sums


@kernel
def row_sums(
    logits, g1, g2, phi, tau, eta, tiles,
    plane, vocab, row_stride, tile_count,
    KIND: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Grid (N, cdiv(T, TILES)): `TILES` tiles of `TILE` columns a program; `plane` = N T."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    columns = tile.to(tl.int64)[:, None] * TILE + tl.arange(0, TILE)[None, :]
    source = logits, g1, g2, phi, row, row_stride, vocab, tl.load(eta + row)
    x = load_phi(source, columns, columns < vocab, KIND)
    sums = tile_sums(x, 1.0 / tl.load(tau + row))
    store_tiles(tiles, plane, row * tile_count + tile, tile < tile_count, sums)


@kernel
def combine(
    logits, g1, g2, phi, tau, eta, tiles, row_maximum, row_s_1, row_s_tau, mass, stats, argmax, weights, written, sums,
    rows, plane, vocab, row_stride, tile_count, steep,
    KIND: tl.constexpr, SOFT: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (N,). `stats` is (4, N): lse_1, lse_tau, entropy_1, entropy_tau; sums run in float64. With `SOFT` the
    `weights` (N, V) and their sums `written` (N, T) by tile are there, and `sums` (N,) gets those of rows."""
    row = tl.program_id(0).to(tl.int64)
    base = tiles + row * tile_count
    inverse_tau = 1.0 / tl.load(tau + row)

    highest = tl.full([BLOCK], -float("inf"), tl.float32)
    for start in range(0, tile_count, BLOCK):
        j = start + tl.arange(0, BLOCK)
        highest = tl.maximum(highest, tl.load(base + j, mask=j < tile_count, other=-float("inf")))
    maximum = tl.max(highest, 0)

    first = tl.full([BLOCK], 2147483647, tl.int32)
    s_1 = tl.zeros([BLOCK], tl.float64)
    t_1 = tl.zeros([BLOCK], tl.float64)
    s_tau = tl.zeros([BLOCK], tl.float64)
    t_tau = tl.zeros([BLOCK], tl.float64)
    for start in range(0, tile_count, BLOCK):
        j = start + tl.arange(0, BLOCK)
        inside = j < tile_count
        tile_maximum = tl.load(base + j, mask=inside, other=-float("inf"))
        first = tl.minimum(first, tl.where(inside & (tile_maximum == maximum), j, 2147483647))
        # An all -inf tile has zero sums; its own delta would be infinite.
        delta = tl.where(tile_maximum == -float("inf"), 0.0, tile_maximum - maximum)
        one = tl.exp(delta)
        own = tl.exp(delta * inverse_tau)
        s = tl.load(base + plane + j, mask=inside, other=0.0)
        t = tl.load(base + 2 * plane + j, mask=inside, other=0.0)
        s_1 += (one * s).to(tl.float64)
        t_1 += (one * (t + delta * s)).to(tl.float64)
        s = tl.load(base + 3 * plane + j, mask=inside, other=0.0)
        t = tl.load(base + 4 * plane + j, mask=inside, other=0.0)
        tl.store(mass + row * tile_count + j, own * s, mask=inside)
        s_tau += (own * s).to(tl.float64)
        t_tau += (own * (t + delta * inverse_tau * s)).to(tl.float64)

    s_one = tl.sum(s_1, 0)
    s_own = tl.sum(s_tau, 0)
    log_one = tl.log(s_one.to(tl.float32))
    log_own = tl.log(s_own.to(tl.float32))
    tl.store(row_maximum + row, maximum)
    tl.store(row_s_1 + row, s_one)
    tl.store(row_s_tau + row, s_own)
    tl.store(stats + row, maximum + log_one)
    tl.store(stats + rows + row, maximum * inverse_tau + log_own)
    tl.store(stats + 2 * rows + row, log_one - (tl.sum(t_1, 0) / s_one).to(tl.float32))
    tl.store(stats + 3 * rows + row, log_own - (tl.sum(t_tau, 0) / s_own).to(tl.float32))

    best = tl.minimum(tl.min(first, 0), tile_count - 1)
    columns = best.to(tl.int64) * TILE + tl.arange(0, TILE)
    source = logits, g1, g2, phi, row, row_stride, vocab, tl.load(eta + row)
    x = load_phi(source, columns, columns < vocab, KIND)
    place = tl.min(tl.where(x == maximum, columns, vocab - 1), 0)
    tl.store(argmax + row, place.to(tl.int64))

    if SOFT:
        total = tl.zeros([BLOCK], tl.float32)
        if tl.load(eta + row) * inverse_tau > steep:
            for start in range(0, vocab, BLOCK):
                there = start + tl.arange(0, BLOCK).to(tl.int64)
                phi_there = load_phi(source, there, there < vocab, KIND)
                weight = tl.exp((phi_there - maximum) * inverse_tau).to(weights.dtype.element_ty)
                tl.store(weights + row * vocab + there, weight, mask=there < vocab)
                total += weight.to(tl.float32)
        else:
            for start in range(0, tile_count, BLOCK):
                j = start + tl.arange(0, BLOCK)
                total += tl.load(written + row * tile_count + j, mask=j < tile_count, other=0.0)
        tl.store(sums + row, tl.sum(total, 0))

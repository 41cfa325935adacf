# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""The mix: soft = softmax(phi / tau) E and embeds = soft + w (E[token] - soft), around or inside a matrix product.

    weights:    out[n, :] = exp((phi[n, slab] - max_n) / tau_n) in the table's dtype, and the sums of what was written
    mix:        soft and embeds from a library's product of the weights with E
    fused_mix:  the same in one kernel: product, normalisation, w, and the row of embeds written where it is read

The weights are normalised by the sum of their *rounded* values, so that soft is a convex combination of table rows
whatever the dtype. `PLACED` embeds go to the rows `place` (N,) of a larger tensor, -1 being nowhere, in its dtype.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.common import kernel, load_phi


@kernel
def weights(
    logits, g1, g2, phi, tau, eta, row_maximum, out, sums,
    first, width, vocab, row_stride, blocks,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (N, cdiv(width, BLOCK)): columns first .. first + width; `out` (N, width), `sums` (N, blocks) float32."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    inside = place < width
    source = logits, g1, g2, phi, row, row_stride, vocab, tl.load(eta + row)
    x = load_phi(source, first + place, inside, KIND)
    weight = tl.exp((x - tl.load(row_maximum + row)) / tl.load(tau + row)).to(out.dtype.element_ty)
    tl.store(out + row * width + place, weight, mask=inside)
    tl.store(sums + row * blocks + tl.program_id(1), tl.sum(tl.where(inside, weight.to(tl.float32), 0.0), 0))


@triton.jit
def _finish(
    average, i, column, inside, table, tokens, w, place, soft, embeds, hidden, table_stride, PLACED: tl.constexpr
):  # fmt: skip
    """Stores a piece (R, C) of soft, and of embeds; `i` (R, 1) are its rows, `column` (1, C) its columns."""
    here = inside & (i >= 0)
    token = tl.load(tokens + i, mask=i >= 0, other=0)
    hard = tl.load(table + token * table_stride + column, mask=here, other=0.0).to(tl.float32)
    mixed = average + tl.load(w + i, mask=i >= 0, other=0.0) * (hard - average)
    tl.store(soft + i * hidden + column, average, mask=here)
    if PLACED:
        i = tl.load(place + i, mask=i >= 0, other=-1)
    tl.store(embeds + i * hidden + column, mixed.to(embeds.dtype.element_ty), mask=here & (i >= 0))


@kernel
def mix(
    product, sums, table, tokens, w, place, soft, embeds, hidden, table_stride,
    PLACED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (N, cdiv(D, BLOCK)): `product` and `soft` (N, D) float32, `sums` (N,) float32."""
    row = tl.program_id(0).to(tl.int64)
    i = row + tl.zeros([1, 1], tl.int64)
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = column < hidden
    average = tl.load(product + i * hidden + column, mask=inside, other=0.0) / tl.load(sums + row)
    _finish(average, i, column, inside, table, tokens, w, place, soft, embeds, hidden, table_stride, PLACED)


@kernel
def fused_mix(
    weights, sums, table, tokens, w, place, parts, arrived, soft, embeds,
    count, blocks, hidden, table_stride, vocab, part_width,
    PLACED: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (PARTS cdiv(N, BM) cdiv(D, BN),): `weights` (N, V) in the table's dtype and `sums` (N, blocks) of them.

    Each program multiplies `part_width` columns of the weights, so that few rows keep a whole device busy too. The last
    one of a tile to arrive adds up its parts, always in the same order, and finishes the tile. How a row is added up
    follows from V and D alone. `parts` is room for (PARTS, N, D) float32; `arrived`, one int32 a tile, is zero before
    and after.
    """
    row_blocks = tl.cdiv(count, BM)
    tiles = row_blocks * tl.cdiv(hidden, BN)
    part = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    i = (tile % row_blocks) * BM + tl.arange(0, BM)
    column = (tile // row_blocks) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    begin = part * part_width
    end = tl.minimum(begin + part_width, vocab)
    weights_at = weights + i.to(tl.int64)[:, None] * vocab + (begin + k)[None, :]
    table_at = table + (begin + k).to(tl.int64)[:, None] * table_stride + column[None, :]
    accumulator = tl.zeros([BM, BN], tl.float32)
    for start in range(begin, end, BK):
        a = tl.load(weights_at, mask=(i[:, None] < count) & (k[None, :] < end - start), other=0.0)
        b = tl.load(table_at, mask=(k[:, None] < end - start) & (column[None, :] < hidden), other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        accumulator = tl.dot(a, b, accumulator, input_precision="ieee")
        weights_at += BK
        table_at += BK * table_stride

    inside = (i[:, None] < count) & (column[None, :] < hidden)
    place_of = i.to(tl.int64)[:, None] * hidden + column[None, :]
    part_size = count.to(tl.int64) * hidden
    tl.store(parts + part * part_size + place_of, accumulator, mask=inside)
    tl.debug_barrier()  # all of the program's stores come before its arrival
    if tl.atomic_add(arrived + tile, 1, sem="acq_rel") == PARTS - 1:
        tl.debug_barrier()
        total = tl.zeros([BM], tl.float32)
        j = tl.arange(0, 16)
        for start in range(0, blocks, 16):
            at = i.to(tl.int64)[:, None] * blocks + start + j[None, :]
            total += tl.sum(tl.load(sums + at, mask=(i[:, None] < count) & (j[None, :] < blocks - start), other=0.0), 1)
        row = tl.where(i < count, i, -1).to(tl.int64)[:, None]
        for piece in range(4):
            own = ((tile // row_blocks) * BN + piece * (BN // 4) + tl.arange(0, BN // 4))[None, :]
            there = (i[:, None] < count) & (own < hidden)
            product = tl.zeros([BM, BN // 4], tl.float32)
            for other in range(PARTS):
                product += tl.load(parts + other * part_size + row * hidden + own, mask=there, other=0.0)
            average = product / tl.where(i < count, total, 1.0)[:, None]
            _finish(average, row, own, there, table, tokens, w, place, soft, embeds, hidden, table_stride, PLACED)
        tl.store(arrived + tile, 0)

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""The gradient step: softmax Jacobian, Adam in closed form, and the next phi's tile sums, in one read of phi.

    grad = q (slope - c) / tau     slope = g @ E.T,  q = softmax(phi / tau),  c = dot(g, soft)
    phi  = phi + eta m_hat / (sqrt(v_hat) + eps)

Two kernels share that epilogue. `step` reads slope from a slab that a library product wrote; `fused_step` computes it
in tensor-core tiles and never writes it. Both leave the sums from which the next step's statistics (both entropies
among them), draw and normaliser follow; `fused_step` also the weights exp((phi - r) / tau) that the next mix multiplies
(`SOFT`), r being the most that phi can be. So the next forward needs no pass of its own. `WRITE`: 0 the gradient (phi
follows from it), 1 phi, 2 phi and both moments (kernels.adam.Plan). The accumulator of a 128 x 128 tile leaves no
registers for an epilogue of the same size, so `fused_step` runs it on eight column pieces of the tile, one after the
other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels import adam
from kernels.gpu.common import EPS, REACH, direction_1, direction_2, kernel, load_phi, store_tiles, tile_sums
from kernels.ops import BETA_1, BETA_2

B1: tl.constexpr = tl.constexpr(BETA_1)
B2: tl.constexpr = tl.constexpr(BETA_2)
M3: tl.constexpr = tl.constexpr(adam.coefficients(3, BETA_1))
V3: tl.constexpr = tl.constexpr(adam.coefficients(3, BETA_2))
RAW_M: tl.constexpr = tl.constexpr(1 - BETA_1**3)  # bias-corrected to raw moment, third update
RAW_V: tl.constexpr = tl.constexpr(1 - BETA_2**3)


@triton.jit
def _epilogue(
    slope, offset, source, columns, mask, m, v, outputs, tau, maximum, scale, m_correction, v_correction,
    KIND: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """One Adam step on a piece (R, C); `offset`, `tau`, `maximum`, `scale` and the source's row and eta are (R, 1). The
    new phi."""
    _, g1, g2, _, row, _, vocab, eta = source
    g_out, phi_out, m_out, v_out = outputs
    x = load_phi(source, columns, mask, KIND)
    g = tl.exp((x - maximum) / tau) * (slope - offset) * scale
    at = row * vocab + columns
    if KIND == 0:
        direction = direction_1(g)
    elif KIND == 1:
        direction = direction_2(tl.load(g1 + at, mask=mask, other=0.0).to(tl.float32), g)
    elif KIND == 2:
        a = tl.load(g1 + at, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(g2 + at, mask=mask, other=0.0).to(tl.float32)
        m_hat = a * M3[0] + b * M3[1] + g * M3[2]
        v_hat = a * a * V3[0] + b * b * V3[1] + g * g * V3[2]
        direction = m_hat / (tl.sqrt(v_hat) + EPS)
        if WRITE == 2:
            tl.store(m_out + at, m_hat * RAW_M, mask=mask)
            tl.store(v_out + at, v_hat * RAW_V, mask=mask)
    else:
        m_new = tl.load(m + at, mask=mask, other=0.0) * B1 + g * (1 - B1)
        v_new = tl.load(v + at, mask=mask, other=0.0) * B2 + g * g * (1 - B2)
        direction = (m_new / m_correction) / (tl.sqrt(v_new / v_correction) + EPS)
        if WRITE == 2:
            tl.store(m_out + at, m_new, mask=mask)
            tl.store(v_out + at, v_new, mask=mask)
    x = x + eta * direction
    if WRITE == 0:
        tl.store(g_out + at, g.to(g_out.dtype.element_ty), mask=mask)
    else:
        tl.store(phi_out + at, x, mask=mask)
    return x


@kernel
def step(
    slope, offset, logits, g1, g2, phi, m, v, g_out, phi_out, m_out, v_out,
    tau, eta, row_maximum, row_s_tau, tiles,
    plane, first, width, vocab, row_stride, tile_count, m_correction, v_correction,
    KIND: tl.constexpr, WRITE: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Grid (N, cdiv(width, TILE TILES)): columns first .. first + width, slope (N, width), offset (N,); plane = N T."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1).to(tl.int64) * (TILE * TILES) + (
        tl.arange(0, TILES).to(tl.int64)[:, None] * TILE + tl.arange(0, TILE)[None, :]
    )
    mask = place < width
    own_tau = tl.load(tau + row)
    scale = 1.0 / (own_tau * tl.load(row_s_tau + row).to(tl.float32))
    x = _epilogue(
        tl.load(slope + row * width + place, mask=mask, other=0.0).to(tl.float32), tl.load(offset + row),
        (logits, g1, g2, phi, row, row_stride, vocab, tl.load(eta + row)), first + place, mask, m, v,
        (g_out, phi_out, m_out, v_out), own_tau, tl.load(row_maximum + row), scale, m_correction, v_correction,
        KIND, WRITE,
    )  # fmt: skip
    tile = first // TILE + tl.program_id(1) * TILES + tl.arange(0, TILES)
    sums = tile_sums(tl.where(mask, x, -float("inf")), 1.0 / own_tau)
    store_tiles(tiles, plane, row * tile_count + tile, tile < tile_count, sums)


@triton.jit
def _halves(x, R: tl.constexpr, C: tl.constexpr):
    """The left and the right half of x (R, C)."""
    return tl.split(tl.permute(tl.reshape(x, (R, 2, C // 2)), (0, 2, 1)))


@triton.jit
def _quarters(x, R: tl.constexpr, C: tl.constexpr):
    """The four quarters of x (R, C), from left to right."""
    left, right = _halves(x, R, C)
    return _halves(left, R, C // 2) + _halves(right, R, C // 2)


@triton.jit
def _merge(one, two, inverse_tau):
    """Tile sums of two pieces of the same tile."""
    top = tl.maximum(one[0], two[0])
    safe = tl.where(top == -float("inf"), 0.0, top)
    a = tl.where(one[0] == -float("inf"), 0.0, one[0] - safe)  # a piece without mass has zero sums
    b = tl.where(two[0] == -float("inf"), 0.0, two[0] - safe)
    a_1, b_1 = tl.exp(a), tl.exp(b)
    a_tau, b_tau = tl.exp(a * inverse_tau), tl.exp(b * inverse_tau)
    return (
        top,
        a_1 * one[1] + b_1 * two[1],
        a_1 * (one[2] + a * one[1]) + b_1 * (two[2] + b * two[1]),
        a_tau * one[3] + b_tau * two[3],
        a_tau * (one[4] + a * inverse_tau * one[3]) + b_tau * (two[4] + b * inverse_tau * two[3]),
    )


@kernel
def fused_step(
    g, table, offset, logits, g1, g2, phi, m, v, g_out, phi_out, m_out, v_out,
    tau, eta, row_maximum, row_s_tau, tiles, weights, written,
    plane, count, hidden, table_stride, vocab, row_stride, tile_count, m_correction, v_correction,
    KIND: tl.constexpr, WRITE: tl.constexpr, SOFT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(N, BM) cdiv(V, BN),): g (N, D), table (V, D), one 16-bit or float32 dtype; BN is the tile width,
    `plane` = N T. For the updates that keep gradients (`KIND` 0 to 2): with moments the epilogue spills.
    With `SOFT`, `weights` (N, V) and their sums by tile, `written` (N, T) float32.

    `GROUP` row blocks share a column block while it is in L2, so the table streams from memory once.
    """
    row_blocks = tl.cdiv(count, BM)
    per_group = GROUP * tl.cdiv(vocab, BN)
    group = tl.program_id(0) // per_group
    height = tl.minimum(row_blocks - group * GROUP, GROUP)
    within = tl.program_id(0) % per_group
    block = group * GROUP + within % height
    tile = within // height

    i = block * BM + tl.arange(0, BM)
    column = tile * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    g_at = g + i.to(tl.int64)[:, None] * hidden + k[None, :]
    table_at = table + column.to(tl.int64)[:, None] * table_stride + k[None, :]
    accumulator = tl.zeros([BM, BN], tl.float32)
    for start in range(0, hidden, BK):
        a = tl.load(g_at, mask=(i[:, None] < count) & (k[None, :] < hidden - start), other=0.0)
        b = tl.load(table_at, mask=(column[:, None] < vocab) & (k[None, :] < hidden - start), other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        accumulator = tl.dot(a, tl.trans(b), accumulator, input_precision="ieee")
        g_at += BK
        table_at += BK

    here = i < count
    row = i.to(tl.int64)
    own_tau = tl.load(tau + row, mask=here, other=1.0)
    inverse_tau = 1.0 / own_tau
    own_eta = tl.load(eta + row, mask=here, other=0.0)[:, None]
    mean = tl.load(offset + i, mask=here, other=0.0)[:, None]
    highest = tl.load(row_maximum + row, mask=here, other=0.0)[:, None]
    total = tl.load(row_s_tau + row, mask=here, other=1.0)
    scale = (1.0 / (own_tau * total.to(tl.float32)))[:, None]

    left, right = _halves(accumulator, BM, BN)
    pieces = _quarters(left, BM, BN // 2) + _quarters(right, BM, BN // 2)
    source = logits, g1, g2, phi, row[:, None], row_stride, vocab, own_eta
    none = tl.zeros([BM], tl.float32)
    sums = tl.full([BM], -float("inf"), tl.float32), none, none, none, none
    total_written = none
    for piece in tl.static_range(8):
        columns = (tile * BN + piece * (BN // 8) + tl.arange(0, BN // 8)).to(tl.int64)[None, :]
        mask = here[:, None] & (columns < vocab)
        x = _epilogue(
            pieces[piece], mean, source, columns, mask, m, v, (g_out, phi_out, m_out, v_out), own_tau[:, None],
            highest, scale, m_correction, v_correction, KIND, WRITE,
        )  # fmt: skip
        x = tl.where(mask, x, -float("inf"))
        if SOFT:
            weight = tl.exp((x - highest - own_eta * REACH) * inverse_tau[:, None]).to(weights.dtype.element_ty)
            tl.store(weights + row[:, None] * vocab + columns, weight, mask=mask)
            total_written += tl.sum(weight.to(tl.float32), 1)
        sums = _merge(sums, tile_sums(x, inverse_tau[:, None]), inverse_tau)
    if SOFT:
        tl.store(written + row * tile_count + tile, total_written, mask=here)
    store_tiles(tiles, plane, row * tile_count + tile, here, sums)


@kernel
def slopes(g, soft, narrow, offset, hidden, BLOCK: tl.constexpr):
    """Grid (N,): g (N, D) float32 in the dtype of `narrow` (N, D), and offset (N,) = dot(that, soft)."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, hidden, BLOCK):
        k = start + tl.arange(0, BLOCK)
        at = row * hidden + k
        a = tl.load(g + at, mask=k < hidden, other=0.0).to(narrow.dtype.element_ty)
        tl.store(narrow + at, a, mask=k < hidden)
        total += a.to(tl.float32) * tl.load(soft + at, mask=k < hidden, other=0.0)
    tl.store(offset + row, tl.sum(total, 0))

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""The two elementwise halves of the mix around a library matrix product.

    weights:  out[n, :] = exp((phi[n, slab] - max_n) / tau_n) in the table's dtype, and the sum of what was written
    mix:      soft = product / sum,  embeds = soft + w (table[token] - soft)

The weights are normalised by the sum of their *rounded* values, so that soft is a convex combination of table rows
whatever the dtype.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.common import load_phi


@triton.jit
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
def mix(product, sums, table, tokens, w, soft, embeds, hidden, table_stride, BLOCK: tl.constexpr):
    """Grid (N, cdiv(D, BLOCK)): `product` (N, D) float32, `sums` (N,) float32, outputs (N, D) float32."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden
    average = tl.load(product + row * hidden + column, mask=inside, other=0.0) / tl.load(sums + row)
    token = tl.load(tokens + row)
    hard = tl.load(table + token * table_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(soft + row * hidden + column, average, mask=inside)
    tl.store(embeds + row * hidden + column, average + tl.load(w + row) * (hard - average), mask=inside)

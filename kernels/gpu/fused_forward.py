# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""The low-memory forward: softmax-weighted embeddings in one kernel, with no (N, V) probabilities.

    soft = softmax(phi / tau) @ table by online softmax (as attention does: Dao, arXiv 2307.08691)

Replaces `weights` and a library product; it saves the slab of weights and pays by computing every exponential once
for each block of `BD` hidden columns. Each program handles one row block, one hidden block and one part of the
vocabulary; parts are combined afterwards in a fixed order, so the result does not vary from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.common import load_phi


@triton.jit
def fused_forward(
    logits, g1, g2, phi, tau, eta, table, parts, sums, maxima,
    rows, hidden, table_stride, vocab, row_stride, part_width, part_count,
    KIND: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(N, BM), cdiv(D, BD), P): parts (P, N, D) float32 relative to each part's largest phi, maxima (N, P),
    and sums (N, P) of the rounded weights that they are made of."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    part = tl.program_id(2)
    here = row < rows
    at = tl.where(here, row, 0)
    own_eta = tl.load(eta + at)[:, None]
    inverse_tau = 1.0 / tl.load(tau + at)
    accumulator = tl.zeros([BM, BD], tl.float32)
    maximum = tl.full([BM], -float("inf"), tl.float32)
    rounded = tl.zeros([BM], tl.float32)
    begin = part.to(tl.int64) * part_width
    end = tl.minimum(begin + part_width, vocab)
    for start in range(begin, end, BV):
        token = start + tl.arange(0, BV).to(tl.int64)
        mask = here[:, None] & (token[None, :] < end)
        x = load_phi(logits, g1, g2, phi, at[:, None], row_stride, vocab, token[None, :], mask, own_eta, KIND)
        top = tl.maximum(maximum, tl.max(x, 1))
        safe = tl.where(top == -float("inf"), 0.0, top)
        shift = tl.where(maximum == -float("inf"), 0.0, maximum - safe)  # nothing summed yet: nothing to rescale
        own = tl.exp(shift * inverse_tau)
        weight = tl.exp((x - safe[:, None]) * inverse_tau[:, None])
        b = tl.load(
            table + start * table_stride + (tl.arange(0, BV)[:, None] * table_stride + column[None, :]),
            mask=(token[:, None] < end) & (column[None, :] < hidden),
            other=0.0,
        )
        a = weight.to(b.dtype)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        rounded = own * rounded + tl.sum(a.to(tl.float32), 1)
        accumulator = tl.dot(a, b, accumulator * own[:, None], input_precision="ieee")
        maximum = top
    out = (part.to(tl.int64) * rows + row)[:, None] * hidden + column[None, :]
    tl.store(parts + out, accumulator, mask=here[:, None] & (column[None, :] < hidden))
    if tl.program_id(1) == 0:
        place = row * part_count + part
        tl.store(sums + place, rounded, mask=here)
        tl.store(maxima + place, maximum, mask=here)

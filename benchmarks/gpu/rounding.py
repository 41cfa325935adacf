"""How far FlashAttention's own rounding is from exact attention on the numbers of `kernels.varlen`'s trial run.

Emulated are the roundings of FlashAttention 2: weights and their gradients are 16-bit factors of products summed in
float32, and of grouped heads each partial gradient of keys and values is rounded before they are added up. Were this
past the trial's tolerance, a right kernel would be refused.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.report import Row
from kernels.trial import TOLERANCE
from kernels.varlen import Spans, reference

HEAD_SIZES = (8, 16, 24, 32, 64, 80, 96, 128, 192, 256)
QUERIES, KEYS = (3, 1, 5), (3, 8, 6)
HEADS, KEY_HEADS = 4, 2


def emulated(q: Tensor, k: Tensor, v: Tensor, g: Tensor, causal: bool) -> list[Tensor]:
    """The output (Tq, H, d) and the gradients of q, k and v for the output's gradient g, all in q's dtype."""
    dtype, groups = q.dtype, q.shape[1] // k.shape[1]
    scale = 1 / math.sqrt(q.shape[-1])

    def rounded(x: Tensor) -> Tensor:
        return x.to(dtype).float()

    out, of_q = torch.empty(q.shape), torch.empty(q.shape)
    of_k, of_v = (torch.empty(len(k), q.shape[1], k.shape[2]) for _ in range(2))
    row = key = 0
    for queries, keys in zip(QUERIES, KEYS, strict=True):
        rows, seen = slice(row, row + queries), slice(key, key + keys)
        row, key = row + queries, key + keys
        for head in range(q.shape[1]):
            one, others = (rows, head), (seen, head // groups)
            scores = scale * q[one].float() @ k[others].float().T
            if causal:
                scores.masked_fill_(~torch.ones_like(scores, dtype=torch.bool).tril(keys - queries), -math.inf)
            unscaled = (scores - scores.amax(-1, keepdim=True)).exp()
            total = unscaled.sum(-1, keepdim=True)
            out[one] = rounded(rounded(unscaled) @ v[others].float() / total)
            mean = (g[one].float() * out[one]).sum(-1, keepdim=True)
            of_scores = rounded(unscaled / total * (g[one].float() @ v[others].float().T - mean))
            of_q[one] = scale * of_scores @ k[others].float()
            of_k[seen, head] = scale * of_scores.T @ q[one].float()
            of_v[seen, head] = rounded(unscaled / total).T @ g[one].float()
    sums = [rounded(x).view(len(k), -1, groups, k.shape[2]).sum(2) for x in (of_k, of_v)]
    return [x.to(dtype) for x in (out, of_q, *sums)]


def differences() -> list[Row]:
    """The largest difference for each dtype and head size, relative to the exact result's norm, and the tolerance."""
    rows: list[Row] = []
    spans = Spans.of(QUERIES, KEYS)
    for dtype in (torch.bfloat16, torch.float16):
        for size in HEAD_SIZES:
            generator = torch.Generator().manual_seed(0)
            shapes = ((9, HEADS, size), (17, KEY_HEADS, size), (17, KEY_HEADS, size), (9, HEADS, size))
            q, k, v, g = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
            worst = 0.0
            for causal in (False, True):
                a, b, c = leaves = [x.float().requires_grad_() for x in (q, k, v)]
                with torch.enable_grad():
                    exact = reference(a, b, c, spans, causal, None)
                    expected = [exact.detach(), *torch.autograd.grad(exact, leaves, g.float())]
                for got, wanted in zip(emulated(q, k, v, g, causal), expected, strict=True):
                    worst = max(worst, float((got.float() - wanted).norm() / wanted.norm()))
            rows.append({"dtype": str(dtype), "head size": size, "worst": worst, "tolerance": TOLERANCE})
    return rows

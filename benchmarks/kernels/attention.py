"""python -m benchmarks.kernels.attention: attention of packed rows, one pass against groups of sdpa.

Two cases of the generated pair's shapes: whole sequences of a diffusion model (both directions, forward only) and rows
of a reward model that continue cached prefixes (causal, forward and gradient). `groups` is sdpa: one call
a length, prefixes copied in front of the rows' keys, and a mask. "cpp" is `kernels.attention`; float32 on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.kernels.measure import seconds
from kernels import attention, varlen


@dataclass(frozen=True)
class Case:
    """Rows of `lengths` tokens; with `prefix` they are causal and each follows that many cached ones."""

    name: str
    lengths: tuple[int, ...]
    prefix: int
    heads: int
    key_heads: int
    size: int

    def operations(self) -> float:
        """Multiplications and additions of the forward, of visible pairs only."""
        pairs = sum(n * self.prefix + (n * (n + 1) / 2 if self.prefix else n * n) for n in self.lengths)
        return 4.0 * pairs * self.heads * self.size


CASES = (
    Case("sequences of one length", (92,) * 16, 0, 8, 8, 32),
    Case("sequences of all lengths", tuple(range(56, 120, 4)), 0, 8, 8, 32),
    Case("rows that continue a prefix", (64,) * 16, 48, 6, 2, 32),
    Case("rows of all lengths that do", tuple(range(32, 96, 4)), 48, 6, 2, 32),
)


def inputs(case: Case) -> tuple[list[Tensor], attention.Piece, Tensor]:
    """q, k, v packed; the prefix's keys and values; a direction for the gradient."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tokens = sum(case.lengths)
    q, g = (random(tokens, case.heads, case.size) for _ in range(2))
    k, v = (random(tokens, case.key_heads, case.size) for _ in range(2))
    keys, values = (random(case.key_heads, case.prefix, case.size) for _ in range(2))
    return [q, k, v], (keys, values), g


def in_groups(case: Case, piece: attention.Piece, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One scaled_dot_product_attention for each run of equal lengths."""
    outputs, start = [], 0
    lengths = list(case.lengths)
    while start < len(lengths):
        length, count = lengths[start], lengths[start:].count(lengths[start])
        first = sum(lengths[:start])
        here = slice(first, first + count * length)
        queries, keys, values = (x[here].view(count, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        mask = None
        if case.prefix:
            keys, values = (
                torch.cat([old.expand(count, -1, -1, -1), new], dim=2)
                for old, new in zip(piece, (keys, values), strict=True)
            )
            mask = torch.ones(length, case.prefix + length, dtype=torch.bool).tril(case.prefix)
        mixed = functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, enable_gqa=case.heads != case.key_heads
        )
        outputs.append(mixed.transpose(1, 2).flatten(0, 1))
        start += count
    return torch.cat(outputs)


def in_one_pass(case: Case, piece: attention.Piece, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`kernels.attention`, the rows' places included."""
    before = [[0]] * len(case.lengths) if case.prefix else None
    rows = attention.Rows(case.lengths, case.lengths, before, [case.prefix])
    return attention.attend(q, k, v, rows, [piece] if case.prefix else [], causal=bool(case.prefix))


def measure(case: Case, way: Callable[..., Tensor], repeats: int) -> tuple[float, float]:
    """Seconds of the forward, and of its gradient."""
    tensors, piece, g = inputs(case)
    with torch.no_grad():
        forward = seconds(lambda: way(case, piece, *tensors), tensors[0].device, repeats)
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = way(case, piece, *leaves)
    backward = seconds(partial(torch.autograd.grad, out, leaves, g, retain_graph=True), tensors[0].device, repeats)
    return forward, backward


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.attention", description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    if varlen.unavailable("cpp", torch.device("cpu"), torch.float32, 32):
        raise SystemExit("benchmarks.kernels.attention compares ways on a CPU, and there is no C++ library here")
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    rate = 2.0 * 1024**3 / seconds(lambda: a @ b, a.device, given.repeats)
    print(
        f"{torch.get_num_threads()} threads, load average {os.getloadavg()[0]:.1f}; products {rate / 1e9:.0f} GFLOP/s"
    )
    columns = "{:<31} {:<9} {:>11} {:>12} {:>9} {:>9} {:>10}"
    print(columns.format("case", "way", "forward ms", "gradient ms", "speed-up", "speed-up", "of product"))
    results: list[dict[str, Any]] = []
    for case in CASES:
        base = measure(case, in_groups, given.repeats)
        for name, way in (("groups", base), ("cpp", measure(case, in_one_pass, given.repeats))):
            forward, backward = way
            share = case.operations() / rate / forward
            print(
                columns.format(
                    case.name, name, f"{1e3 * forward:.2f}", f"{1e3 * backward:.2f}",
                    f"{base[0] / forward:.2f}x", f"{base[1] / backward:.2f}x", f"{share:.0%}",
                )
            )  # fmt: skip
            results.append({"case": case.name, "way": name, "forward": forward, "gradient": backward, "share": share})
    print(json.dumps({"threads": torch.get_num_threads(), "gemm": rate, "results": results}))


if __name__ == "__main__":
    main()

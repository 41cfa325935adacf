"""Both vocabulary products of an inner step inside Triton kernels: `fused_mix` on the way to the reward model, and
`fused_step` on the way back, which also leaves the softmax weights that the next mix multiplies.

How a row is added up does not depend on the rows beside it, as a library's product may. Updates of more than one term,
from the fourth on, or with a table of 32 bits are the library's (`kernels.gpu.ops`): a job's own settings say which.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
import triton
from torch import Tensor

from kernels.gpu import mix as mix_kernels
from kernels.gpu import update as update_kernels
from kernels.gpu.ops import WIDTH, TritonState
from kernels.ops import BETA_1, BETA_2, Term
from kernels.settings import interpreted

# How the products are cut: ROWS x WIDTH results a program, DEPTH summed at a time. Everything compiles without spills
# for sm_80, 89, 90 and 100. The interpreter runs programs one after another, so it takes fewer rows.
ROWS, DEPTH, WARPS, STAGES = 16 if interpreted() else 128, 64, 8, 3
GROUP = 16  # row blocks that share a block of the table while it is in the cache
PROGRAMS = 4 if interpreted() else 128  # for few rows: about one a multiprocessor


def parts(vocab_size: int, hidden: int) -> tuple[int, int]:
    """In how many parts the mix adds up V columns, and how many each takes, a multiple of `DEPTH`."""
    count = max(1, min(PROGRAMS // triton.cdiv(hidden, WIDTH), triton.cdiv(vocab_size, 16 * DEPTH)))
    width = triton.cdiv(vocab_size, count * DEPTH) * DEPTH
    return triton.cdiv(vocab_size, width), width


class FusedState(TritonState):
    """Products in Triton wherever the table's dtype is one that tensor cores take."""

    backend = "fused"

    def _prepare(self) -> None:
        super()._prepare()
        self._soft: tuple[Tensor, Tensor] | None = None  # weights (N, V) of the current phi, and their sums (N, blocks)
        self._written: Tensor | None = None  # sums by tile, between an update and `_combine`
        self._arrived = self.logits.new_empty(0, dtype=torch.int32)

    def _part(self, rows: slice) -> Self:
        part = super()._part(rows)
        if self._soft is not None:
            part._soft = self._soft[0][rows], self._soft[1][rows]
        return part

    def _takes(self, table: Tensor) -> bool:
        return table.stride(-1) == 1 and (table.dtype != torch.float32 or interpreted())

    def _launch_mix(self, table: Tensor, tokens: Tensor, w: Tensor, embeds: Tensor, place: Tensor | None) -> Tensor:
        if not self._takes(table):
            return super()._launch_mix(table, tokens, w, embeds, place)
        if self._soft is None or self._soft[0].dtype != table.dtype:
            weights = self.logits.new_empty(self.logits.shape, dtype=table.dtype)
            self._soft = weights, self._write_weights(0, weights)
        weights, sums = self._soft
        hidden = table.shape[1]
        count, width = parts(self.vocab_size, hidden)
        tiles = triton.cdiv(self.rows, ROWS) * triton.cdiv(hidden, WIDTH)
        if len(self._arrived) < tiles:
            self._arrived = torch.zeros(tiles, dtype=torch.int32, device=table.device)
        soft = torch.empty(self.rows, hidden, device=table.device)
        mix_kernels.fused_mix[(count * tiles,)](
            weights, sums, table, tokens, w.float(), tokens if place is None else place,
            soft.new_empty(count, self.rows, hidden), self._arrived, soft, embeds,
            self.rows, sums.shape[1], hidden, table.stride(0), self.vocab_size, width,
            PLACED=place is not None, PARTS=count, BM=ROWS, BN=WIDTH, BK=DEPTH,
            UPCAST=interpreted(), num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
        return soft

    def _update(self, terms: Sequence[Term]) -> None:
        table = terms[0].table
        if len(terms) > 1 or self.trail.phi is not None or not self._takes(table):
            self._soft = None
            super()._update(terms)
            return
        after = self._next_trail()
        g, hidden = terms[0].g.float().contiguous(), table.shape[1]
        narrow, offset = g.new_empty(g.shape, dtype=table.dtype), g.new_empty(self.rows)
        update_kernels.slopes[(self.rows,)](
            g, terms[0].soft.float().contiguous(), narrow, offset, hidden, BLOCK=1024, num_warps=4
        )
        targets, write = self._targets(after)
        mixes_again = self.updates + 1 != self.expected_updates
        if not mixes_again:
            self._soft = None
        elif self._soft is None or self._soft[0].dtype != table.dtype:
            self._soft = self.logits.new_empty(self.logits.shape, dtype=table.dtype), offset
        weights = self.logits if self._soft is None else self._soft[0]
        self._written = offset.new_empty(self.tiles.maximum.shape) if mixes_again else None
        update_kernels.fused_step[(triton.cdiv(self.rows, ROWS) * self._tile_count,)](
            narrow, table, offset, *self._source(), *targets,
            self._tau, self._eta, self.sums.maximum, self.sums.s_tau, self._tile_planes,
            weights, offset if self._written is None else self._written,
            self._plane, self.rows, hidden, table.stride(0), self.vocab_size, self.logits.stride(0),
            self._tile_count, 1 - BETA_1 ** (self.updates + 1), 1 - BETA_2 ** (self.updates + 1),
            KIND=self._kind, WRITE=write, SOFT=mixes_again, BM=ROWS, BN=WIDTH, BK=DEPTH,
            GROUP=GROUP, UPCAST=interpreted(), num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
        self._follow(after)

    def _combine(self, out: Tensor) -> None:
        if self._written is None or self._soft is None:
            super()._combine(out)
            return
        weights, sums = self._soft[0], torch.empty(self.rows, 1, device=out.device)
        self._launch_combine(out, (weights, self._written, sums))
        self._soft, self._written = (weights, sums), None

"""The state of a denoising step whose passes are Triton kernels; launches only, no arithmetic and no host sync.

Launches check nothing that the public functions have checked. An update is the library's product with an elementwise
kernel, or (`KERNELS_FUSED`) one fused kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from kernels.adam import Trail
from kernels.gpu import draw as draw_kernels
from kernels.gpu import mix as mix_kernels
from kernels.gpu import row_stats as row_kernels
from kernels.gpu import update as update_kernels
from kernels.ops import BETA_1, BETA_2, Mixed, RowParams, Term
from kernels.settings import interpreted, settings
from kernels.tiled import CompiledState, Tiles

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# How the fused update cuts its product: ROWS x WIDTH results a program, DEPTH summed at a time. It compiles without
# spills for sm_80, sm_90 and sm_100. The interpreter runs programs one after another, so it takes fewer rows.
ROWS, WIDTH, DEPTH, WARPS, STAGES = 16 if interpreted() else 128, 128, 64, 8, 3


def pieces(kind: int, write: int) -> int:
    """In how many column pieces the fused update's epilogue runs: more where it reads two gradients or writes phi."""
    return 8 if kind == 2 or write else 4


class TritonState(CompiledState):
    """Tiles of 128 columns, the width of the fused update's block, so that both update variants leave the same sums."""

    backend = "triton"
    tile = WIDTH
    tile_dtype = torch.float32
    slab_elements = 1 << 25

    def __init__(self, logits: Tensor, params: RowParams, updates: int | None) -> None:
        if logits.dtype not in DTYPES or not (logits.is_cuda or interpreted()):
            raise ValueError(f"the triton backend takes CUDA logits in {DTYPES}, not {logits.dtype} on {logits.device}")
        super().__init__(logits, params, updates)

    def _prepare(self) -> None:
        super()._prepare()
        self._tile_planes = torch.stack(self.tiles)
        self.tiles = Tiles(*self._tile_planes.unbind(0))
        self._plane, self._tile_count = self.tiles.maximum.numel(), self.tiles.maximum.shape[1]

    def _source(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """logits, g1, g2 and phi; what the current kind does not read is the logits again."""
        gradients = [*self.trail.gradients, self.logits, self.logits]
        return self.logits, gradients[0], gradients[1], self.logits if self.trail.phi is None else self.trail.phi

    @property
    def _kind(self) -> int:
        return 3 if self.trail.phi is not None else len(self.trail.gradients)

    def _row_sums(self) -> None:
        tiles_a_program = 32
        row_kernels.row_sums[(self.rows, triton.cdiv(self._tile_count, tiles_a_program))](
            *self._source(), self._tau, self._eta, self._tile_planes,
            self._plane, self.vocab_size, self.logits.stride(0), self._tile_count,
            KIND=self._kind, TILE=self.tile, TILES=tiles_a_program, num_warps=8,
        )  # fmt: skip

    def _combine(self, out: Tensor) -> None:
        row_kernels.combine[(self.rows,)](
            *self._source(), self._tau, self._eta, self._tile_planes, *self.sums, out, self._top,
            self.rows, self._plane, self.vocab_size, self.logits.stride(0), self._tile_count,
            KIND=self._kind, TILE=self.tile, BLOCK=1024, num_warps=4,
        )  # fmt: skip

    # -- forward ------------------------------------------------------------------------------------------------------

    def _weights(self, start: int, out: Tensor) -> Tensor:
        block = 4096
        blocks = triton.cdiv(out.shape[1], block)
        sums = torch.empty(self.rows, blocks, device=out.device)
        mix_kernels.weights[(self.rows, blocks)](
            *self._source(), self._tau, self._eta, self.sums.maximum, out, sums,
            start, out.shape[1], self.vocab_size, self.logits.stride(0), blocks,
            KIND=self._kind, BLOCK=block, num_warps=8,
        )  # fmt: skip
        return sums.sum(-1)

    def _mix(self, table: Tensor, tokens: Tensor, w: Tensor) -> Mixed:
        hidden = table.shape[1]
        product = torch.zeros(self.rows, hidden, device=table.device)
        sums = torch.zeros(self.rows, device=table.device)
        for start, stop, slab in self._buffers(self._product_dtype(table)):
            sums += self._weights(start, slab)
            self._accumulate(product, slab, table[start:stop])
        soft, embeds = torch.empty_like(product), torch.empty_like(product)
        block = min(1024, triton.next_power_of_2(hidden))
        mix_kernels.mix[(self.rows, triton.cdiv(hidden, block))](
            product, sums, table, tokens, w.float(), soft, embeds, hidden, table.stride(0), BLOCK=block, num_warps=4
        )
        return Mixed(embeds=embeds, soft=soft)

    # -- backward -----------------------------------------------------------------------------------------------------

    def _update(self, terms: Sequence[Term]) -> None:
        table = terms[0].table
        fits = len(terms) == 1 and self.trail.phi is None and table.stride(-1) == 1
        fits &= table.dtype != torch.float32 or interpreted()
        if not fits or not settings().fused:
            super()._update(terms)
            return
        after = self._next_trail()
        g = terms[0].g.to(self.dtype)
        offset = (g * terms[0].soft.to(self.dtype)).sum(-1)
        targets, write = self._targets(after)
        update_kernels.fused_step[(triton.cdiv(self.rows, ROWS) * self._tile_count,)](
            g.to(table.dtype).contiguous(), table, offset, *self._source(), *targets,
            self._tau, self._eta, self.sums.maximum, self.sums.s_tau, self._tile_planes,
            self._plane, self.rows, table.shape[1], table.stride(0), self.vocab_size, self.logits.stride(0),
            self._tile_count, 1 - BETA_1 ** (self.updates + 1), 1 - BETA_2 ** (self.updates + 1),
            KIND=self._kind, WRITE=write, BM=ROWS, BN=WIDTH, BK=DEPTH,
            SUB=pieces(self._kind, write), GROUP=16,
            UPCAST=interpreted(), num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
        self._follow(after)

    def _targets(self, after: Trail) -> tuple[tuple[Tensor, ...], int]:
        """m, v and the outputs for gradient, phi, m, v; and the `WRITE` mode. Unused places are the logits again."""
        held = (self.trail.m, self.trail.v, after.newest, after.phi, after.m, after.v)
        write = 0 if after.newest is not None else 2 if after.m is not None else 1
        return tuple(self.logits if tensor is None else tensor for tensor in held), write

    def _step(self, slope: Tensor, offset: Tensor, start: int, after: Trail) -> None:
        targets, write = self._targets(after)
        tiles_a_program = 16
        update_kernels.step[(self.rows, triton.cdiv(slope.shape[1], self.tile * tiles_a_program))](
            slope, offset, *self._source(), *targets,
            self._tau, self._eta, self.sums.maximum, self.sums.s_tau, self._tile_planes,
            self._plane, start, slope.shape[1], self.vocab_size, self.logits.stride(0), self._tile_count,
            1 - BETA_1 ** (self.updates + 1), 1 - BETA_2 ** (self.updates + 1),
            KIND=self._kind, WRITE=write, TILE=self.tile, TILES=tiles_a_program, num_warps=8,
        )  # fmt: skip

    # -- drawing ------------------------------------------------------------------------------------------------------

    def _draw_into(self, out: Tensor, keys: Tensor, rows: Tensor | None, never: int) -> None:
        draw_kernels.draw[(len(keys),)](
            *self._source(), self._tau, self._top_p, self._top_k, self._greedy, self._eta,
            self.sums.maximum, self.sums.s_tau, self.sums.mass, self._top, keys,
            keys if rows is None else rows, out, never,
            self.vocab_size, self.logits.stride(0), self._tile_count,
            KIND=self._kind, HAS_INDEX=rows is not None, TILE=self.tile, TILES=128, BLOCK=1024, num_warps=8,
        )  # fmt: skip

    def _filtered_into(self, out: Tensor, tokens: Tensor, rows: Tensor | None) -> None:
        draw_kernels.filtered_stats[(len(tokens),)](
            *self._source(), self._tau, self._top_p, self._top_k, self._eta,
            self.sums.maximum, self.sums.s_tau, self._top, tokens, tokens if rows is None else rows, out,
            len(tokens), self.vocab_size, self.logits.stride(0),
            KIND=self._kind, HAS_INDEX=rows is not None, BLOCK=1024, num_warps=8,
        )  # fmt: skip

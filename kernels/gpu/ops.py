"""The state of a denoising step whose passes are Triton kernels; launches only, no arithmetic and no host sync.

Launches check nothing that the public functions have checked. Both matrix products are the library's, with an
elementwise kernel before or after; `kernels.gpu.fused` has them inside kernels.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kernels.adam import Trail
from kernels.gpu import draw as draw_kernels
from kernels.gpu import kept as kept_kernels
from kernels.gpu import mix as mix_kernels
from kernels.gpu import row_stats as row_kernels
from kernels.gpu import update as update_kernels
from kernels.ops import BETA_1, BETA_2, Mixed, RowParams
from kernels.settings import interpreted
from kernels.tiled import CompiledState, Tiles

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTH = 128  # columns a tile, and of the fused update's block: so both ways to update leave the same sums
SEARCH = {"TILES": 128, "BLOCK": 1024, "SCRATCH": 2048}  # how the last kept rank is looked for


class TritonState(CompiledState):
    """Triton passes around the library's products."""

    backend = "triton"
    tile = WIDTH
    tile_dtype = torch.float32
    slab_elements = 1 << 26

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
        self._launch_combine(out, None)

    def _launch_combine(self, out: Tensor, soft: tuple[Tensor, Tensor, Tensor] | None) -> None:
        """`soft` are the weights that a fused update wrote, their sums by tile, and room for those by row."""
        weights, written, sums = soft or (out, out, out)
        steep = 1.0 if weights.dtype == torch.float16 else 32.0
        row_kernels.combine[(self.rows,)](
            *self._source(), self._tau, self._eta, self._tile_planes, *self.sums, out, self._top,
            weights, written, sums,
            self.rows, self._plane, self.vocab_size, self.logits.stride(0), self._tile_count, steep,
            KIND=self._kind, SOFT=soft is not None, TILE=self.tile, BLOCK=1024, num_warps=4,
        )  # fmt: skip

    # -- forward ------------------------------------------------------------------------------------------------------

    def _weights(self, start: int, out: Tensor) -> Tensor:
        sums = self._write_weights(start, out)
        return sums.sum(-1)

    def _write_weights(self, start: int, out: Tensor) -> Tensor:
        """exp((phi - maximum) / tau) at columns from `start` on into `out` (N, columns), and their sums (N, blocks)."""
        block = 4096
        blocks = triton.cdiv(out.shape[1], block)
        sums = torch.empty(self.rows, blocks, device=out.device)
        mix_kernels.weights[(self.rows, blocks)](
            *self._source(), self._tau, self._eta, self.sums.maximum, out, sums,
            start, out.shape[1], self.vocab_size, self.logits.stride(0), blocks,
            KIND=self._kind, BLOCK=block, num_warps=8,
        )  # fmt: skip
        return sums

    def _mix(self, table: Tensor, tokens: Tensor, w: Tensor) -> Mixed:
        embeds = torch.empty(self.rows, table.shape[1], device=table.device)
        return Mixed(embeds=embeds, soft=self._launch_mix(table, tokens, w, embeds, None))

    def _mix_into(self, table: Tensor, tokens: Tensor, w: Tensor, out: Tensor, place: Tensor) -> Tensor:
        return self._launch_mix(table, tokens, w, out, place)

    def _launch_mix(self, table: Tensor, tokens: Tensor, w: Tensor, embeds: Tensor, place: Tensor | None) -> Tensor:
        """Writes `embeds`, its rows `place` where there are such; returns soft (N, D)."""
        hidden = table.shape[1]
        product = torch.zeros(self.rows, hidden, device=table.device)
        sums = torch.zeros(self.rows, device=table.device)
        for start, stop, slab in self._buffers(self._product_dtype(table)):
            sums += self._weights(start, slab)
            self._product(product, slab, table[start:stop], add=True)
        soft = torch.empty_like(product)
        block = min(1024, triton.next_power_of_2(hidden))
        mix_kernels.mix[(self.rows, triton.cdiv(hidden, block))](
            product, sums, table, tokens, w.float(), tokens if place is None else place, soft, embeds,
            hidden, table.stride(0), PLACED=place is not None, BLOCK=block, num_warps=4,
        )  # fmt: skip
        return soft

    # -- backward -----------------------------------------------------------------------------------------------------

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
        index, grid = keys if rows is None else rows, (len(keys),)
        constants = {"KIND": self._kind, "HAS_INDEX": rows is not None, "num_warps": 8}
        shape = self.vocab_size, self.logits.stride(0), self._tile_count
        filters = self._tau, self._top_p, self._top_k
        draw_kernels.draw[grid](
            *self._source(), *filters, self._greedy, self._eta, self.sums.maximum, self.sums.s_tau, self.sums.mass,
            self._top, keys, index, out, never, *shape, TILE=self.tile, TILES=128, BLOCK=1024, **constants,
        )  # fmt: skip
        kept_kernels.draw_kept[grid](
            *self._source(), *filters, self._eta, self.sums.maximum, self.sums.s_tau, self.stats.entropy_tau,
            self._tile_planes, keys, index, out, self._scratch(out), never, *shape, **SEARCH, **constants,
        )  # fmt: skip

    def _filtered_into(self, out: Tensor, tokens: Tensor, rows: Tensor | None) -> None:
        kept_kernels.filtered_stats[(len(tokens),)](
            *self._source(), self._tau, self._top_p, self._top_k, self._eta,
            self.sums.maximum, self.sums.s_tau, self.stats.entropy_tau, self._top, self._tile_planes,
            tokens, tokens if rows is None else rows, out, self._scratch(tokens),
            len(tokens), self.vocab_size, self.logits.stride(0), self._tile_count,
            KIND=self._kind, HAS_INDEX=rows is not None, TILE=self.tile, **SEARCH, num_warps=8,
        )  # fmt: skip

    def _scratch(self, tokens: Tensor) -> Tensor:
        """Room for the values and ids of `SEARCH`'s candidates, for each of the tokens (n,)."""
        return tokens.new_empty(len(tokens), SEARCH["SCRATCH"], 2, dtype=torch.int32)

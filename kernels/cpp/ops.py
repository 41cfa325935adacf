"""The state of a denoising step whose passes run in kernels.cpp; the matrix products stay torch's.

Float32 and bfloat16 logits on the CPU; arithmetic in float32, sums across tiles in float64.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.adam import Trail
from kernels.cpp.build import DTYPES, call, library, unavailable_reason
from kernels.ops import RowParams
from kernels.tiled import CompiledState


class _State(ctypes.Structure):
    """`struct State` of tiles.h."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("logits", "g1", "g2", "phi", "m", "v", "tau", "top_p", "eta")]
        + [(name, ctypes.c_void_p) for name in ("top_k", "greedy", "maximum", "s_1", "t_1", "s_tau", "t_tau")]
        + [(name, ctypes.c_void_p) for name in ("row_maximum", "row_s_1", "row_s_tau", "mass", "argmax")]
        + [(name, ctypes.c_int64) for name in ("rows", "vocab", "tiles", "row_stride")]
        + [(name, ctypes.c_int32) for name in ("dtype", "threads")]
    )


class CppState(CompiledState):
    """Tiles and trails in C++. ValueError without a compiled library, or for other logits than `DTYPES`."""

    backend = "cpp"

    def __init__(self, logits: Tensor, params: RowParams, updates: int | None) -> None:
        if library() is None:
            raise ValueError(f"the cpp backend is not available: {unavailable_reason()}")
        if logits.device.type != "cpu" or logits.dtype not in DTYPES:
            raise ValueError(f"the cpp backend takes CPU logits in {tuple(DTYPES)}, not {logits.dtype} {logits.device}")
        super().__init__(logits, params, updates)

    def _prepare(self) -> None:
        self._described: _State | None = None
        super()._prepare()

    def _refresh(self) -> None:
        self._described = None
        super()._refresh()

    def _call(self, name: str, *arguments: object) -> None:
        """Calls a pass with the C structure for the state as it has been since the last update."""
        if self._described is None:
            self._described = self._describe()
        call(name, ctypes.byref(self._described), *arguments)

    def _describe(self) -> _State:
        trail = self.trail
        g1, g2, *_ = *trail.gradients, None, None
        columns = self._tau, self._top_p, self._eta, self._top_k, self._greedy
        held = self.logits, g1, g2, trail.phi, trail.m, trail.v, *columns, *self.tiles, *self.sums, self._top
        return _State(
            *[None if tensor is None else tensor.data_ptr() for tensor in held],
            rows=self.rows,
            vocab=self.vocab_size,
            tiles=self.tiles.maximum.shape[1],
            row_stride=self.logits.stride(0),
            dtype=DTYPES[self.logits.dtype],
            threads=torch.get_num_threads(),
        )

    def _slabs(self) -> Iterator[tuple[int, int]]:
        """Column ranges up to `slab_elements`: a pass takes any number of columns from a tile's first on."""
        width = max(1, self.slab_elements // (self.rows * self.tile)) * self.tile
        for start in range(0, self.vocab_size, width):
            yield start, min(start + width, self.vocab_size)

    def _row_sums(self) -> None:
        self._call("row_sums")

    def _combine(self, out: Tensor) -> None:
        self._call("combine", out)

    def _weights(self, start: int, out: Tensor) -> None:
        self._call("weights", start, out.shape[1], out, DTYPES[out.dtype])

    def _step(self, slope: Tensor, offset: Tensor, start: int, after: Trail) -> None:
        written = after.newest, after.phi, after.m, after.v
        self._call("step", *written, self.updates + 1, slope, DTYPES[slope.dtype], offset, start, slope.shape[1])

    def _draw_into(self, out: Tensor, keys: Tensor, rows: Tensor | None, never: int) -> None:
        self._call("draw", keys, rows, len(keys), never, out)

    def _filtered_into(self, out: Tensor, tokens: Tensor, rows: Tensor | None) -> None:
        self._call("filtered_stats", tokens, rows, len(tokens), out)

"""The state of a denoising step whose passes run in kernels.cpp; the matrix products stay torch's.

Float32, bfloat16 and float16 logits on the CPU; arithmetic in float32, sums across tiles in float64.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kernels.adam import HISTORY, Plan, coefficients, raw_coefficients
from kernels.cpp.build import library, threads, unavailable_reason
from kernels.ops import BETA_1, BETA_2, FilteredStats, RowParams, RowStats
from kernels.tiled import Rows, TiledState

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_Three = ctypes.c_float * 3


class _State(ctypes.Structure):
    """`struct State` of tiles.h."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("logits", "g1", "g2", "phi", "m", "v", "tau", "top_p", "eta")]
        + [(name, ctypes.c_void_p) for name in ("top_k", "greedy", "maximum", "s_1", "t_1", "s_tau", "t_tau")]
        + [(name, ctypes.c_void_p) for name in ("row_maximum", "row_s_1", "row_s_tau", "mass", "argmax")]
        + [(name, ctypes.c_int64) for name in ("rows", "vocab", "tiles", "row_stride")]
        + [(name, ctypes.c_int32) for name in ("dtype", "threads")]
    )


class _Plan(ctypes.Structure):
    """`struct Plan` of tiles.h."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("gradient", "phi", "m", "v")]
        + [(name, ctypes.c_double) for name in ("m_correction", "v_correction")]
        + [(name, _Three) for name in ("m_weight", "v_weight", "m_raw", "v_raw")]
        + [("t", ctypes.c_int32)]
    )


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class CppState(TiledState):
    """Tiles and trails in C++; the caller guarantees CPU logits of a dtype in `DTYPES`."""

    backend = "cpp"

    def __init__(self, logits: Tensor, params: RowParams, updates: int | None) -> None:
        loaded = library()
        if loaded is None:
            raise ValueError(f"the cpp backend is not available: {unavailable_reason()}")
        if logits.device.type != "cpu" or logits.dtype not in DTYPES:
            raise ValueError(f"the cpp backend takes CPU logits in {list(DTYPES)}, not {logits.dtype}, {logits.device}")
        self._library = loaded
        if logits.ndim == 2 and logits.stride(-1) != 1:
            logits = logits.contiguous()
        super().__init__(logits, params, updates)

    def _prepare(self) -> None:
        count, tiles = self.tiles.maximum.shape
        kept = self.params
        self._columns = {  # float32, contiguous, and alive as long as their addresses are used
            "tau": kept.tau.float().contiguous(),
            "top_p": kept.top_p.float().contiguous(),
            "eta": kept.eta.float().contiguous(),
            "top_k": kept.top_k.contiguous(),
            "greedy": kept.greedy.contiguous(),
            "argmax": torch.empty(count, dtype=torch.long),
        }
        sums = torch.empty(3, count, dtype=torch.float64)
        self.sums = Rows(sums[0], sums[1], sums[2], torch.empty(count, tiles, dtype=torch.float64))

    def _state(self) -> ctypes._Pointer[_State] | object:
        """The C structure for the state as it is now."""
        trail, tiles, sums = self.trail, self.tiles, self.sums
        gradients = [*trail.gradients, None, None]
        return ctypes.byref(
            _State(
                logits=self.logits.data_ptr(),
                g1=_pointer(gradients[0]),
                g2=_pointer(gradients[1]),
                phi=_pointer(trail.phi),
                m=_pointer(trail.m),
                v=_pointer(trail.v),
                **{name: tensor.data_ptr() for name, tensor in self._columns.items()},
                maximum=tiles.maximum.data_ptr(),
                s_1=tiles.s_1.data_ptr(),
                t_1=tiles.t_1.data_ptr(),
                s_tau=tiles.s_tau.data_ptr(),
                t_tau=tiles.t_tau.data_ptr(),
                row_maximum=sums.maximum.data_ptr(),
                row_s_1=sums.s_1.data_ptr(),
                row_s_tau=sums.s_tau.data_ptr(),
                mass=sums.mass.data_ptr(),
                rows=self.rows,
                vocab=self.vocab_size,
                tiles=tiles.maximum.shape[1],
                row_stride=self.logits.stride(0),
                dtype=DTYPES[self.logits.dtype],
                threads=threads(),
            )
        )

    def _row_sums(self) -> None:
        self._library.row_sums(self._state())

    def _refresh(self, rows: Tensor | None) -> None:
        out = torch.empty(4, self.rows)
        argmax = torch.empty(self.rows, dtype=torch.long)  # a new one: earlier statistics stay as they were
        self._columns["argmax"] = argmax
        self._library.combine(self._state(), ctypes.c_void_p(out.data_ptr()))
        self._stats = RowStats(out[0], out[1], out[2], out[3], argmax)

    def _weights(self, start: int, out: Tensor) -> None:
        self._library.weights(
            self._state(), ctypes.c_int64(start), ctypes.c_int64(out.shape[1]), ctypes.c_void_p(out.data_ptr())
        )

    def _step(self, slope: Tensor, offset: Tensor, start: int, plan: Plan, rows: Tensor | None) -> None:
        t = plan.t
        short = min(t, HISTORY + 1)  # the closed form is used, and its coefficients read, up to this update only

        def three(weights: tuple[float, ...]) -> ctypes.Array[ctypes.c_float]:
            return _Three(*weights)

        structure = _Plan(
            gradient=_pointer(plan.gradient),
            phi=_pointer(plan.phi),
            m=_pointer(plan.m),
            v=_pointer(plan.v),
            m_correction=1 - BETA_1**t,
            v_correction=1 - BETA_2**t,
            m_weight=three(coefficients(short, BETA_1)),
            v_weight=three(coefficients(short, BETA_2)),
            m_raw=three(raw_coefficients(short, BETA_1)),
            v_raw=three(raw_coefficients(short, BETA_2)),
            t=t,
        )
        offset = offset.contiguous()
        self._library.step(
            self._state(),
            ctypes.byref(structure),
            ctypes.c_void_p(slope.data_ptr()),
            ctypes.c_void_p(offset.data_ptr()),
            ctypes.c_int64(start),
            ctypes.c_int64(slope.shape[1]),
            ctypes.c_void_p(_pointer(rows)),
            ctypes.c_int64(slope.shape[0]),
        )

    def _draw(self, keys: Tensor, rows: Tensor | None, never: int | None) -> Tensor:
        keys = keys.contiguous()
        rows = None if rows is None else rows.contiguous()
        tokens = torch.empty(len(keys), dtype=torch.long)
        self._library.draw(
            self._state(),
            ctypes.c_void_p(keys.data_ptr()),
            ctypes.c_void_p(_pointer(rows)),
            ctypes.c_int64(len(keys)),
            ctypes.c_int64(-1 if never is None else never),
            ctypes.c_void_p(tokens.data_ptr()),
        )
        return tokens

    def _filtered_stats(self, tokens: Tensor, rows: Tensor | None) -> FilteredStats:
        tokens = tokens.contiguous()
        rows = None if rows is None else rows.contiguous()
        out = torch.empty(3, len(tokens))
        self._library.filtered_stats(
            self._state(),
            ctypes.c_void_p(tokens.data_ptr()),
            ctypes.c_void_p(_pointer(rows)),
            ctypes.c_int64(len(tokens)),
            ctypes.c_void_p(out.data_ptr()),
        )
        return FilteredStats(*out.unbind(0))

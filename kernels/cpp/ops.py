"""The state of a denoising step whose passes run in kernels.cpp; the matrix products stay torch's.

Float32, bfloat16 and float16 logits on the CPU; arithmetic in float32, sums across tiles in float64.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kernels.adam import HISTORY, Plan, coefficients, raw_coefficients
from kernels.cpp.build import DTYPES, LOGITS_DTYPES, address, call, library, number, unavailable_reason
from kernels.ops import BETA_1, BETA_2, FilteredStats, RowParams, RowStats
from kernels.tiled import Rows, TiledState

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
    )


class CppState(TiledState):
    """Tiles and trails in C++. ValueError without a compiled library, or for other logits than `LOGITS_DTYPES`."""

    backend = "cpp"

    def __init__(self, logits: Tensor, params: RowParams, updates: int | None) -> None:
        if library() is None:
            raise ValueError(f"the cpp backend is not available: {unavailable_reason()}")
        if logits.device.type != "cpu" or logits.dtype not in LOGITS_DTYPES:
            raise ValueError(f"the cpp backend takes CPU logits in {LOGITS_DTYPES}, not {logits.dtype} {logits.device}")
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
        }
        sums = torch.empty(3, count, dtype=torch.float64)
        self.sums = Rows(sums[0], sums[1], sums[2], torch.empty(count, tiles, dtype=torch.float64))

    def _call(self, name: str, *arguments: object) -> None:
        """Calls a pass with the C structure for the state as it is now."""
        trail, tiles, sums = self.trail, self.tiles, self.sums
        first, second, *_ = [*trail.gradients, None, None]
        held = {"g1": first, "g2": second, "phi": trail.phi, "m": trail.m, "v": trail.v, **self._columns}
        held |= {name: getattr(tiles, name) for name in ("maximum", "s_1", "t_1", "s_tau", "t_tau")}
        held |= {"row_maximum": sums.maximum, "row_s_1": sums.s_1, "row_s_tau": sums.s_tau, "mass": sums.mass}
        state = _State(
            logits=address(self.logits),
            **{key: address(value) for key, value in held.items()},
            rows=self.rows,
            vocab=self.vocab_size,
            tiles=tiles.maximum.shape[1],
            row_stride=self.logits.stride(0),
            dtype=DTYPES[self.logits.dtype],
            threads=torch.get_num_threads(),
        )
        call(name, ctypes.byref(state), *arguments)

    def _row_sums(self) -> None:
        self._call("row_sums")

    def _refresh(self) -> None:
        out = torch.empty(4, self.rows)
        argmax = torch.empty(self.rows, dtype=torch.long)  # a new one: earlier statistics stay as they were
        self._columns["argmax"] = argmax
        self._call("combine", out)
        self._stats = RowStats(out[0], out[1], out[2], out[3], argmax)

    def _weights(self, start: int, out: Tensor) -> None:
        self._call("weights", start, out.shape[1], out, number(out.dtype))

    def _step(self, slope: Tensor, offset: Tensor, start: int, plan: Plan) -> None:
        t = plan.t
        short = min(t, HISTORY + 1)  # the closed form is used, and its coefficients read, up to this update only
        outputs = {name: address(getattr(plan, name)) for name in ("gradient", "phi", "m", "v")}
        structure = _Plan(
            **outputs,
            m_correction=1 - BETA_1**t,
            v_correction=1 - BETA_2**t,
            m_weight=_Three(*coefficients(short, BETA_1)),
            v_weight=_Three(*coefficients(short, BETA_2)),
            m_raw=_Three(*raw_coefficients(short, BETA_1)),
            v_raw=_Three(*raw_coefficients(short, BETA_2)),
        )
        self._call("step", ctypes.byref(structure), slope, number(slope.dtype), offset, start, slope.shape[1])

    def _draw(self, keys: Tensor, rows: Tensor | None, never: int | None) -> Tensor:
        tokens = torch.empty(len(keys), dtype=torch.long)
        keys, rows = keys.contiguous(), None if rows is None else rows.contiguous()
        self._call("draw", keys, rows, len(keys), -1 if never is None else never, tokens)
        return tokens

    def _filtered_stats(self, tokens: Tensor, rows: Tensor | None) -> FilteredStats:
        out = torch.empty(3, len(tokens))
        tokens, rows = tokens.contiguous(), None if rows is None else rows.contiguous()
        self._call("filtered_stats", tokens, rows, len(tokens), out)
        return FilteredStats(*out.unbind(0))

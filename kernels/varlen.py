"""Attention over packed sequences of different lengths in one kernel: torch's own on a GPU ("varlen"). What plays its
part on a CPU ("cpp") is `kernels.attention`.

Sequence i has the queries cu_q[i]:cu_q[i + 1] and the keys cu_k[i]:cu_k[i + 1]. With `causal` its last query sees all
of its keys, the one before all but the last, and so on (aligned at the bottom right), which is what rows that continue
a prefix need. Torch's wants 16 bits and heads of a multiple of 8 channels, 256 at most; ours float32 or bfloat16.

`choose` names what a device, dtype and head size can run. It believes no version number: a backend is taken only after
a small case, forward and backward, has agreed with `reference` on the very device. "sdpa" stands for doing without:
callers then run scaled_dot_product_attention on groups of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kernels import attention
from kernels.cpp.build import DTYPES
from kernels.transfer import upload
from kernels.trial import TOLERANCE, difference

BACKENDS = ("varlen", "cpp", "sdpa")
CHOICES = ("auto", *BACKENDS)
MAX_HEAD_SIZE = 256


@dataclass(frozen=True, slots=True, eq=False)
class Spans:
    """B sequences among packed queries and keys. cu_q and cu_k: (B + 1,) int32 on the tensors' device, from 0 on;
    max_q and max_k: bounds on the lengths, on the host. A sequence without queries costs nothing."""

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int

    @classmethod
    def of(cls, queries: Sequence[int], keys: Sequence[int], device: torch.device | str = "cpu") -> Spans:
        """Of sequences of these lengths; ValueError where a sequence has fewer keys than queries, or none."""
        if len(queries) != len(keys) or not queries or any(k < max(q, 1) for q, k in zip(queries, keys, strict=True)):
            raise ValueError(f"queries {list(queries)} for keys {list(keys)}")
        cu_q, cu_k = (
            upload(torch.cat((torch.zeros(1, dtype=torch.int32), torch.tensor(x).cumsum(0).int())), device)
            for x in (queries, keys)
        )
        return cls(cu_q, cu_k, max(queries), max(keys))


Attention = Callable[[Tensor, Tensor, Tensor, Spans, bool, float | None], Tensor]


def attend(
    backend: str, q: Tensor, k: Tensor, v: Tensor, spans: Spans, *, causal: bool = False, scale: float | None = None
) -> Tensor:
    """Attention within each sequence, differentiable: q (Tq, H, d), k and v (Tk, Hkv, d) with Hkv a divisor of H ->
    (Tq, H, d). `scale` None is 1 / sqrt(d). ValueError for a backend that is no kernel."""
    if (implementation := _IMPLEMENTATIONS.get(backend)) is None:
        raise ValueError(f"{backend!r} is no variable-length attention; known: {', '.join(_IMPLEMENTATIONS)}")
    return implementation(q, k, v, spans, causal, scale)


def reference(q: Tensor, k: Tensor, v: Tensor, spans: Spans, causal: bool, scale: float | None) -> Tensor:
    """The specification, one sequence at a time from the same metadata, on any device and dtype."""
    queries, keys = ([*x.diff().tolist(), len(y) - int(x[-1])] for x, y in ((spans.cu_q, q), (spans.cu_k, k)))
    return by_sequence(q, k, v, queries, keys, causal, scale)


def by_sequence(
    q: Tensor, k: Tensor, v: Tensor, queries: Sequence[int], keys: Sequence[int], causal: bool, scale: float | None
) -> Tensor:
    """The same where the host knows how many queries and keys each sequence has."""
    outputs, groups = [], q.shape[1] // k.shape[1]
    # split, not slices: the gradient of a split is one concatenation, that of n slices n full-size sums.
    for own in zip(*(torch.split(x, list(n)) for x, n in ((q, queries), (k, keys), (v, keys))), strict=True):
        count, seen = len(own[0]), len(own[1])
        if not count:
            continue
        one, *others = (x.transpose(0, 1) for x in own)  # (heads, n, d)
        key, value = (x.repeat_interleave(groups, 0)[None] for x in others)
        mask = None
        if causal and count > 1:
            mask = torch.ones(count, seen, dtype=torch.bool, device=q.device).tril(seen - count)
        mixed = functional.scaled_dot_product_attention(one[None], key, value, attn_mask=mask, scale=scale)
        outputs.append(mixed[0].transpose(0, 1))
    return torch.cat(outputs)


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, spans: Spans, causal: bool, scale: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        q, k, v, spans.cu_q, spans.cu_k, spans.max_q, spans.max_k,
        scale=scale, window_size=(-1, 0) if causal else (-1, -1), enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return out if isinstance(out, Tensor) else out[0]


_IMPLEMENTATIONS: dict[str, Attention] = {"varlen": _torch_varlen, "reference": reference}


def choose(name: str, device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """The backend that runs: the one named, or with "auto" the first of `BACKENDS` that can.

    ValueError for an unknown name, and for a named backend that cannot run, with the reason.
    """
    if name not in CHOICES:
        raise ValueError(f"{name!r} is not one of {', '.join(CHOICES)}")
    if name == "auto":
        return next(each for each in BACKENDS if unavailable(each, device, dtype, head_size) is None)
    if (reason := unavailable(name, device, dtype, head_size)) is not None:
        raise ValueError(f"{name} cannot run here: {reason}")
    return name


def unavailable(name: str, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Why a backend cannot run, or None where it can."""
    if name == "sdpa":
        return None
    if name == "cpp":
        if device.type != "cpu" or dtype not in DTYPES:
            return f"it needs float32 or bfloat16 on the CPU, not {str(dtype).removeprefix('torch.')} on {device}"
        return None if attention.runs() else "there is no C++ compiler, or the environment turns the C++ passes off"
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it needs float16 or bfloat16, not {str(dtype).removeprefix('torch.')}"
    if head_size % 8 or head_size > MAX_HEAD_SIZE:
        return f"it needs heads of a multiple of 8 channels, at most {MAX_HEAD_SIZE}, not {head_size}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or later"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this build of torch has no flash attention"
    return _probe(name, device, dtype, head_size)


_TRIALS = (([3, 1, 5], [3, 8, 6], False), ([3, 1, 5], [3, 8, 6], True), ([1, 0, 1, 0], [5, 2, 8, 3], True))
"""Queries and keys of ragged rows with prefixes, all of their queries and, as for a reward, the last one alone: there
keys that do not count are a sequence that nobody asks. Whether they are causal."""


@functools.cache
def _probe(name: str, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Run small cases with grouped heads, forward and backward; why the backend is not to be trusted, or None."""
    generator = torch.Generator().manual_seed(0)
    results: tuple[list[Tensor], list[Tensor]] = ([], [])
    for queries, keys, causal in _TRIALS:
        spans = Spans.of(queries, keys, device)
        asked = torch.tensor(queries).repeat_interleave(torch.tensor(keys)).nonzero()[:, 0].to(device)
        shapes = [(sum(queries), 4, head_size)] * 2 + [(sum(keys), 2, head_size)] * 2
        q, g, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
        try:
            for each, kind, found in zip((name, "reference"), (dtype, torch.float32), results, strict=True):
                a, b, c = leaves = [x.to(kind, copy=True).requires_grad_() for x in (q, k, v)]
                with torch.enable_grad():
                    out = _IMPLEMENTATIONS[each](a, b, c, spans, causal, None)
                    of_q, *of_keys = torch.autograd.grad(out, leaves, g.to(kind))
                found += [out.detach(), of_q, *(x.index_select(0, asked) for x in of_keys)]
        except (RuntimeError, ImportError, TypeError, ValueError) as error:
            return f"a trial run failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    off = difference(*results)
    return None if off <= TOLERANCE else f"a trial run was off by {off:.3g}"

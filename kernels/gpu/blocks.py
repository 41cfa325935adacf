# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""What a decoder block does between its matrix products, on a GPU: one kernel a pass, forward or back.

The functions are those of `kernels.blocks`, which has their meaning. Every number that a kernel specialises on follows
from the model, none from the batch: so one form of each serves all batches. Arithmetic is float32, and what is stored
is rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.blocks import Turn

TILE = 1024  # channels of SwiGLU that a program computes
HEADS = 8  # heads of one token that a program splits off


@triton.jit
def norm(
    x, added, weight, total, out, inverse, width, epsilon,
    ADDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (S,): x, added, total, out (S, width), inverse (S,). Without `ADDS`, `added` and `total` are not used."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    at = row * width + column
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        value += tl.load(added + at, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / width + epsilon)
    tl.store(inverse + row, scale)
    weights = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (value * scale * weights).to(out.dtype.element_ty), mask=inside)


@triton.jit
def norm_gradient(
    g, total, weight, inverse, more, out, width,
    ADDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (S,): out (S, width) is the norm's gradient and, with `ADDS`, `more`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    at = row * width + column
    scaled = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
    scaled *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(total + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(inverse + row)
    normed = value * scale
    gradient = scale * (scaled - normed * (tl.sum(scaled * normed, 0) / width))
    if ADDS:
        gradient += tl.load(more + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, gradient.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gate(x, out, width, BLOCK: tl.constexpr):
    """Grid (S, cdiv(width, BLOCK)): x (S, 2 width) holds [gate, up]; out (S, width)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = row * (2 * width) + column
    z = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + at + width, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, (z * tl.sigmoid(z) * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def gate_gradient(g, x, out, width, BLOCK: tl.constexpr):
    """Grid (S, cdiv(width, BLOCK)): g (S, width); x and out (S, 2 width) hold [gate, up]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = row * (2 * width) + column
    slope = tl.load(g + row * width + column, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + at + width, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(z)
    of_gate = slope * up * share * (1.0 + z * (1.0 - share))
    tl.store(out + at, of_gate.to(out.dtype.element_ty), mask=inside)
    tl.store(out + at + width, (slope * z * share).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _tile(heads, key_heads, HALF: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """What a program of a split works on: row, head (HEADS, 1), channel (1, BLOCK), and which of these are q's, k's and
    v's."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    inside = channel < HALF
    of_q = inside & (head < heads)
    of_k = inside & (head >= heads) & (head < heads + key_heads)
    of_v = inside & (head >= heads + key_heads) & (head < heads + 2 * key_heads)
    return row, head, channel, of_q, of_k, of_v


@triton.jit
def _halves(x, at, mask, HALF: tl.constexpr):
    """Channels i and i + size / 2 of some heads, in float32."""
    one = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    return one, tl.load(x + at + HALF, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_halves(x, at, mask, one, two, HALF: tl.constexpr):
    tl.store(x + at, one.to(x.dtype.element_ty), mask=mask)
    tl.store(x + at + HALF, two.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _head_weights(q_weight, k_weight, channel, of_q, of_k, HALF: tl.constexpr):
    """The norms' weights for both halves of each head."""
    q_one, q_two = _halves(q_weight, channel, of_q, HALF)
    k_one, k_two = _halves(k_weight, channel, of_k, HALF)
    return q_one + k_one, q_two + k_two


@triton.jit
def split(
    x, q_weight, k_weight, cosines, sines, q, k, v, heads, key_heads, epsilon,
    NORMED: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (S, cdiv(heads + 2 key_heads, HEADS)): x (S, (heads + 2 key_heads) 2 HALF)."""
    row, head, channel, of_q, of_k, of_v = _tile(heads, key_heads, HALF, HEADS, BLOCK)
    turned = of_q | of_k
    one, two = _halves(x, (row * (heads + 2 * key_heads) + head) * (2 * HALF) + channel, turned | of_v, HALF)
    if NORMED:
        square = tl.sum(one * one, 1) + tl.sum(two * two, 1)
        scale = (1.0 / tl.sqrt(square / (2 * HALF) + epsilon))[:, None]
        w_one, w_two = _head_weights(q_weight, k_weight, channel, of_q, of_k, HALF)
        one, two = tl.where(turned, one * scale * w_one, one), tl.where(turned, two * scale * w_two, two)
    cosine = tl.load(cosines + row * HALF + channel, mask=turned, other=1.0)
    sine = tl.load(sines + row * HALF + channel, mask=turned, other=0.0)
    one, two = one * cosine - two * sine, two * cosine + one * sine
    _store_halves(q, (row * heads + head) * (2 * HALF) + channel, of_q, one, two, HALF)
    at = (row * key_heads + head - heads) * (2 * HALF) + channel
    _store_halves(k, at, of_k, one, two, HALF)
    _store_halves(v, at - key_heads * (2 * HALF), of_v, one, two, HALF)


@triton.jit
def split_gradient(
    g_q, g_k, g_v, x, q_weight, k_weight, cosines, sines, out, heads, key_heads, epsilon,
    NORMED: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid as `split`: `out` like x, which is read where heads were normalised."""
    row, head, channel, of_q, of_k, of_v = _tile(heads, key_heads, HALF, HEADS, BLOCK)
    turned = of_q | of_k
    q_one, q_two = _halves(g_q, (row * heads + head) * (2 * HALF) + channel, of_q, HALF)
    at = (row * key_heads + head - heads) * (2 * HALF) + channel
    k_one, k_two = _halves(g_k, at, of_k, HALF)
    v_one, v_two = _halves(g_v, at - key_heads * (2 * HALF), of_v, HALF)
    one, two = q_one + k_one + v_one, q_two + k_two + v_two
    cosine = tl.load(cosines + row * HALF + channel, mask=turned, other=1.0)
    sine = tl.load(sines + row * HALF + channel, mask=turned, other=0.0)
    one, two = one * cosine + two * sine, two * cosine - one * sine
    at = (row * (heads + 2 * key_heads) + head) * (2 * HALF) + channel
    if NORMED:
        x_one, x_two = _halves(x, at, turned, HALF)
        square = tl.sum(x_one * x_one, 1) + tl.sum(x_two * x_two, 1)
        scale = (1.0 / tl.sqrt(square / (2 * HALF) + epsilon))[:, None]
        w_one, w_two = _head_weights(q_weight, k_weight, channel, of_q, of_k, HALF)
        x_one, x_two, w_one, w_two = x_one * scale, x_two * scale, w_one * one, w_two * two
        mean = ((tl.sum(w_one * x_one, 1) + tl.sum(w_two * x_two, 1)) / (2 * HALF))[:, None]
        one = tl.where(turned, scale * (w_one - x_one * mean), one)
        two = tl.where(turned, scale * (w_two - x_two * mean), two)
    _store_halves(out, at, turned | of_v, one, two, HALF)


def add_rms_norm(x: Tensor, added: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.blocks`."""
    total, out = x if added is None else torch.empty_like(x), torch.empty_like(x)
    inverse = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        norm[(x.shape[0],)](
            x, x if added is None else added, weight, total, out, inverse, x.shape[1], epsilon,
            ADDS=added is not None, **norm_form(x.shape[1]),
        )  # fmt: skip
    return total, out, inverse


def rms_norm_gradient(g: Tensor, total: Tensor, weight: Tensor, inverse: Tensor, more: Tensor | None) -> Tensor:
    """See `kernels.blocks`."""
    out = torch.empty_like(total)
    with torch.cuda.device_of(g):
        norm_gradient[(g.shape[0],)](
            g, total, weight, inverse, g if more is None else more, out, g.shape[1],
            ADDS=more is not None, **norm_form(g.shape[1]),
        )  # fmt: skip
    return out


def swiglu(wide: Tensor) -> Tensor:
    """See `kernels.blocks`."""
    rows, width = wide.shape[0], wide.shape[1] // 2
    out = wide.new_empty(rows, width)
    with torch.cuda.device_of(wide):
        gate[(rows, triton.cdiv(width, TILE))](wide, out, width, BLOCK=TILE)
    return out


def swiglu_gradient(g: Tensor, wide: Tensor) -> Tensor:
    """See `kernels.blocks`."""
    out = torch.empty_like(wide)
    with torch.cuda.device_of(g):
        gate_gradient[(g.shape[0], triton.cdiv(g.shape[1], TILE))](g, wide, out, g.shape[1], BLOCK=TILE)
    return out


def split_heads(x: Tensor, heads: int, key_heads: int, turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.blocks`."""
    rows, half = turn.cosines.shape
    q, k, v = (x.new_empty(rows, count, 2 * half) for count in (heads, key_heads, key_heads))
    with torch.cuda.device_of(x):
        split[(rows, triton.cdiv(heads + 2 * key_heads, HEADS))](
            x, *_weights(x, turn), turn.cosines, turn.sines, q, k, v, heads, key_heads, turn.epsilon,
            **split_form(half, normed=_normed(turn)),
        )  # fmt: skip
    return q, k, v


def split_heads_gradient(g_q: Tensor, g_k: Tensor, g_v: Tensor, x: Tensor, turn: Turn) -> Tensor:
    """See `kernels.blocks`."""
    out, heads, key_heads = torch.empty_like(x), g_q.shape[1], g_k.shape[1]
    with torch.cuda.device_of(x):
        split_gradient[(x.shape[0], triton.cdiv(heads + 2 * key_heads, HEADS))](
            g_q.contiguous(), g_k.contiguous(), g_v.contiguous(), x, *_weights(x, turn),
            turn.cosines, turn.sines, out, heads, key_heads, turn.epsilon,
            **split_form(turn.cosines.shape[1], normed=_normed(turn)),
        )  # fmt: skip
    return out


def norm_form(width: int) -> dict[str, int]:
    """How a norm's kernels are compiled: one program a row, which it holds in registers."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


def _weights(x: Tensor, turn: Turn) -> list[Tensor]:
    """The norms' weights; x, which is then not read, where there is none."""
    return [x if weight is None else weight for weight in (turn.query_weight, turn.key_weight)]


def _normed(turn: Turn) -> bool:
    return turn.query_weight is not None or turn.key_weight is not None


def split_form(half: int, *, normed: bool) -> dict[str, int | bool]:
    """How a split is compiled, for heads of 2 `half` channels."""
    return {"NORMED": normed, "HALF": half, "HEADS": HEADS, "BLOCK": triton.next_power_of_2(half)}

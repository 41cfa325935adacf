"""Llama's family of decoders (Llama, Mistral, Qwen2, Qwen3), once for diffusion models and reward models.

A block is the usual pre-norm pair: attention with rotary positions and grouped key heads, then SwiGLU, each added to
the stream. Members of the family differ in biases and in norms of the heads, and in what they are used for: a diffusion
model reads every masked position in both directions and may be trained; a reward model is causal, reads one token a row
and is differentiated with respect to its inputs alone. Parameter names are Llama's, which Dream's checkpoints and those
of the reward models share. Shapes are packed: S tokens, width d, H heads and Hkv key heads of `size` channels.

The modules are the plain expressions: what training runs, and float64. A network that is frozen runs as `models.frozen`
has it, where that can.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.linear import activation_dtype, linear
from server.models.frozen import Frozen, adapted
from server.models.packing import Attention, PackedLayout, attend
from server.types import DecoderShape

if TYPE_CHECKING:
    from server.models.lora import Run


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama 3's longer context: a rotation that turns `low` times or less within `length` positions, the context of
    before, is slowed down by `factor`; one that turns `high` times or more is not; between them it is in between."""

    factor: float
    low: float
    high: float
    length: float

    def slow(self, frequencies: Tensor) -> Tensor:
        """Radians a position, scaled; any shape."""
        turns = frequencies * (self.length / (2 * math.pi))
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig(DecoderShape):
    """What a network of the family is made from. `vocab_size` is the embedding's width. What follows `rope_theta`
    concerns diffusion models only."""

    vocab_size: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    mask_token_id: int = -1
    context_length: int = 2048
    tie_word_embeddings: bool = False


@dataclass(frozen=True, slots=True)
class Variant:
    """How members of the family differ: biases of q, k and v, and of the attention's output; norms of q and k heads."""

    qkv_bias: bool = False
    out_bias: bool = False
    head_norms: bool = False


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Where norms and rotations compute: float64 stays, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Linear(nn.Linear):
    """A projection that takes activations wider than its weight (see `kernels.linear`)."""

    def forward(self, input: Tensor, runs: Sequence[Run] = ()) -> Tensor:  # noqa: A002  (the name that torch gives it)
        """(N, in) -> (N, out) in the input's dtype: one product for all rows, and for the rows of each of `runs` what
        its adapter adds to them."""
        return adapted(linear(input, self.weight, self.bias), input, ((self, slice(None)),), runs)


class Embedding(nn.Embedding):
    """Token embeddings, in the dtype that the network computes in."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name that torch gives it)
        """(S,) int64 -> (S, d)."""
        return super().forward(input).to(self.activation_dtype)

    @property
    def activation_dtype(self) -> torch.dtype:
        """The weight's dtype, or float32 where this device has no instructions for it."""
        return activation_dtype(self.weight.dtype, self.weight.device)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in float32 at least, returned in x's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        exact = x.to(compute_dtype(x.dtype))
        return functional.rms_norm(exact, self.weight.shape, self.weight.to(exact.dtype), self.eps).to(x.dtype)


class RotaryTable:
    """Cosines and sines of position * theta^(-2i/d), i < d/2, with the frequencies scaled where the model's are: one
    table per (dtype, device), grown on demand.

    Computed in float64 and rounded once, so that far positions lose nothing. Not a module: it holds no weights.
    """

    def __init__(self, head_size: int, theta: float, scaling: RopeScaling | None = None) -> None:
        self._head_size = head_size
        self._theta = theta
        self._scaling = scaling
        self._tables: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def rows(self, positions: Tensor, max_length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(cos, sin), each (S, d/2), for `positions` (S,) int64, all below `max_length`; float32 or float64."""
        key = (compute_dtype(dtype), positions.device)
        table = self._tables.get(key)
        if table is None or table[0].shape[0] < max_length:
            table = self._build(1 << (max_length - 1).bit_length(), *key)
            self._tables[key] = table
        cos, sin = table
        return cos[positions], sin[positions]

    def _build(self, length: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        # An inference tensor in the table would break a later training forward.
        with torch.inference_mode(False), torch.no_grad():
            exponents = torch.arange(0, self._head_size, 2, dtype=torch.float64) / self._head_size
            frequencies = self._theta**-exponents
            if self._scaling is not None:
                frequencies = self._scaling.slow(frequencies)
            angles = torch.arange(length, dtype=torch.float64).unsqueeze(1) * frequencies
            return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (S, heads, size), pairing channel i with i + size / 2, by tables (S, size / 2); in x's dtype."""
    cos, sin = cos[:, None], sin[:, None]
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class SelfAttention(nn.Module):
    """The projections of an attention; what happens between `heads` and `o_proj` depends on the layout."""

    def __init__(self, config: DecoderConfig, variant: Variant) -> None:
        super().__init__()
        self.counts = (config.heads, config.key_heads, config.key_heads)
        self.size = config.head_size
        width, key_width, _ = (count * self.size for count in self.counts)
        self.q_proj = Linear(config.hidden, width, bias=variant.qkv_bias)
        self.k_proj = Linear(config.hidden, key_width, bias=variant.qkv_bias)
        self.v_proj = Linear(config.hidden, key_width, bias=variant.qkv_bias)
        self.o_proj = Linear(width, config.hidden, bias=variant.out_bias)
        self.q_norm = RMSNorm(self.size, config.rms_norm_eps) if variant.head_norms else None
        self.k_norm = RMSNorm(self.size, config.rms_norm_eps) if variant.head_norms else None

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor, runs: Sequence[Run] = ()) -> Tensor:
        """q (S, H, size) of x (S, d), normalised where the family does, and rotated."""
        return self._turned(self.q_proj(x, runs), self.q_norm, cos, sin)

    def keys(self, x: Tensor, cos: Tensor, sin: Tensor, runs: Sequence[Run] = ()) -> tuple[Tensor, Tensor]:
        """k likewise and v, (S, Hkv, size)."""
        values = self.v_proj(x, runs)
        return self._turned(self.k_proj(x, runs), self.k_norm, cos, sin), values.view(len(x), -1, self.size)

    def _turned(self, projected: Tensor, norm: RMSNorm | None, cos: Tensor, sin: Tensor) -> Tensor:
        heads = projected.view(len(projected), -1, self.size)
        return rotate(heads if norm is None else norm(heads), cos, sin)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden, config.intermediate, bias=False)
        self.up_proj = Linear(config.hidden, config.intermediate, bias=False)
        self.down_proj = Linear(config.intermediate, config.hidden, bias=False)

    def forward(self, x: Tensor, runs: Sequence[Run] = ()) -> Tensor:
        """(N, d) -> (N, d)."""
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x, runs)) * self.up_proj(x, runs), runs)
        return out


class Block(nn.Module):
    """Attention, then SwiGLU, each after its norm and added to the stream."""

    def __init__(self, config: DecoderConfig, variant: Variant) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config, variant)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden, config.rms_norm_eps)

    def heads(self, x: Tensor, cos: Tensor, sin: Tensor, runs: Sequence[Run] = ()) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of the stream x (S, d)."""
        normed = self.input_layernorm(x)
        return self.self_attn.queries(normed, cos, sin, runs), *self.self_attn.keys(normed, cos, sin, runs)

    def close(self, x: Tensor, mixed: Tensor, runs: Sequence[Run] = ()) -> Tensor:
        """The block after its attention: x (N, d) and the heads' output (N, H, size) -> (N, d)."""
        x = x + self.self_attn.o_proj(mixed.flatten(1), runs)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x), runs)
        return out


class Decoder(nn.Module):
    """Embeddings, blocks and final norm: a model without its head.

    attention_backend: as `kernels.varlen.choose` gave it. frozen: the same as straight lines, once there are any.
    """

    def __init__(self, config: DecoderConfig, variant: Variant) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden)
        self.blocks = [Block(config, variant) for _ in range(config.layers)]
        self.layers = nn.ModuleList(self.blocks)
        self.norm = RMSNorm(config.hidden, config.rms_norm_eps)
        self.rotary = RotaryTable(config.head_size, config.rope_theta, config.rope_scaling)
        self.attention_backend = "sdpa"
        self.frozen: Frozen | None = None

    def freeze(self, *, stack: bool) -> None:
        """The weights stay as they are from now on. `stack`: see `Frozen`."""
        self.requires_grad_(False).eval()
        self.frozen = Frozen(self, stack=stack)

    def states(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        attention: Attention,
        rows: Tensor | None,
        runs: Sequence[Run] = (),
    ) -> Tensor:
        """Final-norm states (S, d), or (N, d) at packed indices `rows` (N,), of embeddings x (S, d) with rotations
        (S, head_size / 2) and the adapters of `runs`: without any, a function of tensors alone."""
        if self.frozen is not None and self.frozen.takes(x):
            return self.frozen.states(x, cos, sin, attention, rows, runs)
        last = len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            mixed = attention(index, *block.heads(x, cos, sin, runs))
            if rows is not None and index == last and not runs:
                # After the last attention nothing mixes positions: the rest is computed only where it is read. With
                # adapters it is not: which of `rows` are whose is known to the device alone.
                x, mixed = x[rows], mixed[rows]
            x = block.close(x, mixed, runs)
        out: Tensor = self.norm(x if rows is None or not runs else x[rows])
        return out

    def last_states(self, x: Tensor, cos: Tensor, sin: Tensor, layout: PackedLayout, backend: str) -> Tensor:
        """Final-norm states (B, d) of each row's last token, of embeddings x (S, d). In the last block only that token
        has a query, an output projection and an MLP."""
        if self.frozen is not None and self.frozen.takes(x):
            return self.frozen.last_states(x, cos, sin, layout, backend)
        *before, block = self.blocks
        for index, each in enumerate(before):
            x = each.close(x, attend(layout, index, *each.heads(x, cos, sin), backend))
        if layout.hidden is not None:  # whatever a kernel leaves in the gradients of keys that nobody asked
            x = torch.where(layout.hidden[:, None], x.detach(), x)
        normed, lasts = block.input_layernorm(x), layout.lasts
        turned = cos.index_select(0, lasts), sin.index_select(0, lasts)
        q = block.self_attn.queries(normed.index_select(0, lasts), *turned)
        mixed = attend(layout, len(before), q, *block.self_attn.keys(normed, cos, sin), backend, last=True)
        out: Tensor = self.norm(block.close(x.index_select(0, lasts), mixed))
        return out

    def keys_and_values(
        self, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention, runs: Sequence[Run] = ()
    ) -> list[tuple[Tensor, Tensor]]:
        """Rotated keys and values, (S, Hkv, size) each a layer, of embeddings x (S, d): what a prefix is made of. The
        last block ends with them."""
        if self.frozen is not None and self.frozen.takes(x):
            return self.frozen.keys_and_values(x, cos, sin, attention, runs)
        captured = []
        for index, block in enumerate(self.blocks):
            q, k, v = block.heads(x, cos, sin, runs)
            captured.append((k, v))
            if index < len(self.blocks) - 1:
                x = block.close(x, attention(index, q, k, v), runs)
        return captured

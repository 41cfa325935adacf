"""A decoder whose weights stay as they are, without modules and without autograd: straight lines of products.

Beside a small batch's arithmetic a step of the engine is Python: modules that call modules, and autograd around every
little operation. So once a network is frozen, what `models.layers` defines runs here instead, where `kernels.blocks`
takes it: one tuple of weights a block, and the gradient of the inputs, the only one that is ever asked for, written
out. What is added to the stream waits for the next norm, which adds and normalises in one pass.

Shapes are those of `models.layers`: S packed tokens, width d, H heads and Hkv key heads of `size` channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from kernels import blocks
from kernels.linear import linear, linear_gradient
from server.models.packing import Attention, PackedLayout, attend_with_gradient

if TYPE_CHECKING:
    from server.models.layers import Decoder, RMSNorm
    from server.models.lora import Run

Parts = tuple[tuple[nn.Linear, slice], ...]
"""Projections, and which columns of a product's result are whose."""
Projected = tuple[tuple[Tensor, blocks.Turn], ...]
"""What the stacked products for q, k and v gave, one of all tokens or two, each with what its heads went through."""


class Product(NamedTuple):
    """A projection, or several of the same input in one: weight (out, in), bias (out,)."""

    weight: Tensor
    bias: Tensor | None
    parts: Parts

    @classmethod
    def of(cls, *projections: nn.Linear) -> Product:
        """Several are put in one piece, of which their weights become views: there is no second copy."""
        weights = [each.weight.detach() for each in projections]
        biases = [each.bias.detach() for each in projections if each.bias is not None]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        parts, first = [], 0
        for projection, own in zip(projections, weights, strict=True):
            parts.append((projection, slice(first, first + len(own))))
            projection.weight.data = weight[parts[-1][1]]
            first += len(own)
        return cls(weight, torch.cat(biases) if biases else None, tuple(parts))

    def __call__(self, x: Tensor, runs: Sequence[Run] = ()) -> Tensor:
        """(N, in) -> (N, out) in the input's dtype: one product for all rows, and what adapters add to theirs."""
        out = linear(x, self.weight, self.bias)
        return adapted(out, x, self.parts, runs) if runs else out


def adapted(out: Tensor, x: Tensor, parts: Parts, runs: Sequence[Run]) -> Tensor:
    """A product's result (N, out) of x (N, in) with what the adapter of each of `runs` adds to its rows, in place."""
    for adapter, rows in runs:
        for projection, columns in parts:
            if (factors := adapter.get(projection)) is not None:
                down, up = factors
                out[rows, columns] += linear(linear(x[rows], down), up)
    return out


class Layer(NamedTuple):
    """A block's weights: q, k and v in one product or three, gate and up in one or two. Norms are in the dtype that the
    network computes in."""

    norm: Tensor
    qkv: tuple[Product, ...]
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Product
    mlp_norm: Tensor
    wide: tuple[Product, ...]
    down: Product


class Saved(NamedTuple):
    """What a block's gradient reads: the stream before each of its norms, what these found, projections, and the
    attention's way back."""

    x: Tensor
    inverse: Tensor
    projected: Projected
    back: Callable[[Tensor], tuple[Tensor, ...]]
    y: Tensor
    y_inverse: Tensor
    wide: tuple[Tensor, ...]


class Frozen:
    """The passes of a `layers.Decoder`, with its weights as they are now. With `stack` projections of the same input
    become one product: fewer and larger, but weights that were mapped files are then copies in this process's memory.
    """

    def __init__(self, decoder: Decoder, *, stack: bool) -> None:
        attention = decoder.blocks[0].self_attn
        (self._heads, self._key_heads, _), self._size = attention.counts, attention.size
        self._eps = float(decoder.norm.eps)
        self._dtype = decoder.embed_tokens.activation_dtype

        def norm(module: RMSNorm) -> Tensor:
            return module.weight.detach().to(self._dtype)

        def products(*projections: nn.Linear) -> tuple[Product, ...]:
            return (Product.of(*projections),) if stack else tuple(map(Product.of, projections))

        self._layers = [
            Layer(
                norm(block.input_layernorm),
                products(block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj),
                None if block.self_attn.q_norm is None else norm(block.self_attn.q_norm),
                None if block.self_attn.k_norm is None else norm(block.self_attn.k_norm),
                Product.of(block.self_attn.o_proj),
                norm(block.post_attention_layernorm),
                products(block.mlp.gate_proj, block.mlp.up_proj),
                Product.of(block.mlp.down_proj),
            )
            for block in decoder.blocks
        ]
        self._norm = norm(decoder.norm)
        self._last = len(self._layers) - 1

    def takes(self, x: Tensor) -> bool:
        """Whether the passes below take embeddings x, which ask for no gradient by autograd."""
        fits = x.dtype == self._dtype and self._size <= blocks.MAX_HEAD_SIZE and blocks.runs(x)
        return fits and not (x.requires_grad and torch.is_grad_enabled())

    def states(
        self, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention, rows: Tensor | None, runs: Sequence[Run]
    ) -> Tensor:
        """See `layers.Decoder.states`."""
        added: Tensor | None = None
        for index, layer in enumerate(self._layers):
            x, normed, _ = blocks.add_rms_norm(x, added, layer.norm, self._eps)
            mixed = attention(index, *self._split(layer, normed, cos, sin, runs)[1])
            if rows is not None and index == self._last and not runs:
                x, mixed = x[rows], mixed[rows]
            x, _, _, added = self._close(layer, x, mixed, runs)
        if rows is not None and added is not None and runs:
            x, added = x[rows], added[rows]
        return blocks.add_rms_norm(x, added, self._norm, self._eps)[1]

    def keys_and_values(
        self, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention, runs: Sequence[Run]
    ) -> list[tuple[Tensor, Tensor]]:
        """See `layers.Decoder.keys_and_values`."""
        captured, added = [], None
        for index, layer in enumerate(self._layers):
            x, normed, _ = blocks.add_rms_norm(x, added, layer.norm, self._eps)
            _, (q, k, v) = self._split(layer, normed, cos, sin, runs)
            captured.append((k, v))
            if index < self._last:
                x, _, _, added = self._close(layer, x, attention(index, q, k, v), runs)
        return captured

    def last_states(self, x: Tensor, cos: Tensor, sin: Tensor, layout: PackedLayout, backend: str) -> Tensor:
        """See `layers.Decoder.last_states`. Products must be stacked."""
        return self._through(x, cos, sin, layout, backend)[1]

    def last_states_and_gradient(
        self, x: Tensor, cos: Tensor, sin: Tensor, layout: PackedLayout, backend: str
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The same, and what turns their gradient (B, d) into that of x (S, d), once."""
        saved: list[Saved] = []
        total, out, inverse = self._through(x, cos, sin, layout, backend, saved)

        def gradient(g: Tensor) -> Tensor:
            g = blocks.rms_norm_gradient(g, total, self._norm, inverse, None)
            return self._gradient(g, layout, saved)

        return out, gradient

    def _through(
        self, x: Tensor, cos: Tensor, sin: Tensor, layout: PackedLayout, backend: str, saved: list[Saved] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Stream, states (B, d) and what the final norm found; into `saved`, what `_gradient` reads."""
        added = None
        for index, layer in enumerate(self._layers):
            lasts = layout.lasts if index == self._last else None
            x, normed, inverse = blocks.add_rms_norm(x, added, layer.norm, self._eps)
            projected, heads = self._split(layer, normed, cos, sin, lasts=lasts)
            mixed, back = attend_with_gradient(layout, index, *heads, backend, last=lasts is not None)
            stream = x if lasts is None else x.index_select(0, lasts)
            y, y_inverse, wide, added = self._close(layer, stream, mixed)
            if saved is not None:
                saved.append(Saved(x, inverse, projected, back, y, y_inverse, wide))
            x = y
        return blocks.add_rms_norm(x, added, self._norm, self._eps)

    def _gradient(self, g: Tensor, layout: PackedLayout, saved: list[Saved]) -> Tensor:
        """That of the embeddings (S, d) from that of the stream after the last block, g (B, d). Empties `saved`."""
        for index in reversed(range(len(self._layers))):
            layer, kept = self._layers[index], saved.pop()
            lasts = layout.lasts if index == self._last else None
            hidden = blocks.swiglu_gradient(linear_gradient(g, layer.down.weight), *kept.wide)
            hidden = linear_gradient(hidden, layer.wide[0].weight)
            g = blocks.rms_norm_gradient(hidden, kept.y, layer.mlp_norm, kept.y_inverse, g)
            heads = kept.back(linear_gradient(g, layer.out.weight).view(len(g), self._heads, self._size))
            hidden = _split_gradient(layer.qkv[0].weight, kept.projected, heads, lasts)
            if lasts is not None:
                g = torch.zeros_like(kept.x).index_copy_(0, lasts, g)
            g = blocks.rms_norm_gradient(hidden, kept.x, layer.norm, kept.inverse, g)
            if lasts is not None and layout.hidden is not None:
                g = g.masked_fill(layout.hidden[:, None], 0.0)  # whatever a kernel leaves for keys that nobody asked
        return g

    def _split(
        self,
        layer: Layer,
        normed: Tensor,
        cos: Tensor,
        sin: Tensor,
        runs: Sequence[Run] = (),
        lasts: Tensor | None = None,
    ) -> tuple[Projected, tuple[Tensor, Tensor, Tensor]]:
        """Stacked projections; q, k and v, with `lasts` of these tokens alone q."""
        turn = blocks.Turn(layer.q_norm, layer.k_norm, self._eps, cos, sin)
        if len(layer.qkv) == 3:
            q, k, v = [each(normed, runs) for each in layer.qkv]
            q, *_ = blocks.split_heads(q, self._heads, 0, turn)
            k, *_ = blocks.split_heads(k, self._key_heads, 0, turn._replace(query_weight=layer.k_norm))
            return (), (q, k, v.view(len(v), self._key_heads, self._size))
        if lasts is None:
            wide = layer.qkv[0](normed, runs)
            return ((wide, turn),), blocks.split_heads(wide, self._heads, self._key_heads, turn)
        (weight, bias, _), first = layer.qkv[0], self._heads * self._size
        asked = linear(normed.index_select(0, lasts), weight[:first], None if bias is None else bias[:first])
        turned = turn._replace(cosines=cos.index_select(0, lasts), sines=sin.index_select(0, lasts))
        q, *_ = blocks.split_heads(asked, self._heads, 0, turned)
        others = linear(normed, weight[first:], None if bias is None else bias[first:])
        _, k, v = blocks.split_heads(others, 0, self._key_heads, turn)
        return ((asked, turned), (others, turn)), (q, k, v)

    def _close(
        self, layer: Layer, x: Tensor, mixed: Tensor, runs: Sequence[Run] = ()
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...], Tensor]:
        """The block after its attention: the stream before the second norm, what the norm found, gate and up where they
        are stacked, and what the MLP adds to the stream."""
        y, normed, inverse = blocks.add_rms_norm(x, layer.out(mixed.flatten(1), runs), layer.mlp_norm, self._eps)
        wide = [each(normed, runs) for each in layer.wide]
        if len(wide) == 1:
            return y, inverse, (wide[0],), layer.down(blocks.swiglu(wide[0]), runs)
        return y, inverse, (), layer.down(blocks.swiglu_apart(*wide), runs)


def _split_gradient(weight: Tensor, projected: Projected, heads: tuple[Tensor, ...], lasts: Tensor | None) -> Tensor:
    """The gradient of a block's normed input from those of q, k and v; `weight` is that of their one product."""
    g_q, g_k, g_v = heads
    if lasts is None:
        ((wide, turn),) = projected
        return linear_gradient(blocks.split_heads_gradient(g_q, g_k, g_v, wide, turn), weight)
    (asked, turned), (others, turn) = projected
    first, nothing = asked.shape[1], g_k[:, :0]
    of_q = blocks.split_heads_gradient(g_q, nothing, nothing, asked, turned)
    of_others = blocks.split_heads_gradient(nothing, g_k, g_v, others, turn)
    hidden = linear_gradient(of_others, weight[first:])
    return hidden.index_add_(0, lasts, linear_gradient(of_q, weight[:first]))

"""`torch.compile` of a model's trunk: the passes between its products become few, without a graph for every batch.

What depends on a batch's lengths is kept out of the compiled graph: rotations are its inputs, and attention is one
operator that it does not look into. What is left depends on nothing but the numbers of tokens, rows and sequences,
which are symbols, so one graph serves all batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.varlen import Spans
from kernels.varlen import attend as attend_spans
from server.models.base import Trunk
from server.models.layers import Decoder
from server.models.packing import PackedLayout, attend


@torch.library.custom_op("entrgi::packed_attention", mutates_args=())
def packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, backend: str) -> Tensor:
    """`packing.attend` of whole sequences in both directions, from tensors alone."""
    if backend in ("sdpa", "cpp"):
        return attend(PackedLayout.of(cu_seqlens.diff().tolist(), q.device), 0, q, k, v, backend).contiguous()
    return attend_spans(backend, q, k, v, Spans(cu_seqlens, cu_seqlens, longest, longest)).contiguous()


@packed_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, backend: str) -> Tensor:
    return q.new_empty(q.shape)


def compiled_trunk(decoder: Decoder, plain: Trunk, backend: str | Callable[..., Any] = "inductor") -> Trunk:
    """A trunk for inference. `backend` is torch.compile's. The first call compiles, which takes half a minute. `plain`
    is the trunk as it is written: one token, one row or none have graphs of their own, training needs gradients, and
    cached prefixes and adapters are no inputs of the graph, so these run as they are."""

    def states(tokens: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, longest: int, rows: Tensor) -> Tensor:
        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            mixed: Tensor = packed_attention(q, k, v, cu_seqlens, longest, decoder.attention_backend)
            return mixed

        return decoder.states(decoder.embed_tokens(tokens), cos, sin, attention, rows)

    compiled = torch.compile(states, dynamic=True, fullgraph=True, backend=backend)

    def trunk(tokens: Tensor, layout: PackedLayout, rows: Tensor | None) -> Tensor:
        foreign = layout.links or layout.adapters
        if rows is None or len(rows) < 2 or len(tokens) < 2 or torch.is_grad_enabled() or foreign:
            return plain(tokens, layout, rows)
        cos, sin = decoder.rotary.rows(layout.positions, layout.longest, decoder.embed_tokens.activation_dtype)
        out: Tensor = compiled(tokens, cos, sin, layout.cu_q, layout.longest, rows)
        return out

    return trunk

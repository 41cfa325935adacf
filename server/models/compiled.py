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


class CompiledTrunk:
    """A `base.Trunk` for inference. `backend` is torch.compile's. The first call compiles, which takes half a minute;
    `plain` is the trunk as it is written."""

    def __init__(
        self,
        decoder: Decoder,
        plain: Callable[[Tensor, PackedLayout, Tensor | None], Tensor],
        backend: str | Callable[..., Any] = "inductor",
    ) -> None:
        self._decoder, self._plain = decoder, plain

        def states(tokens: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, longest: int, rows: Tensor) -> Tensor:
            def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                mixed: Tensor = packed_attention(q, k, v, cu_seqlens, longest, decoder.attention_backend)
                return mixed

            return decoder.states(decoder.embed_tokens(tokens), cos, sin, attention, rows)

        self._states = torch.compile(states, dynamic=True, fullgraph=True, backend=backend)

    def __call__(self, tokens: Tensor, layout: PackedLayout, rows: Tensor | None) -> Tensor:
        """See `base.Trunk`. One token, one row or none have graphs of their own, training needs gradients, and cached
        prefixes are no inputs of the graph: these run as they are."""
        if rows is None or len(rows) < 2 or len(tokens) < 2 or torch.is_grad_enabled() or layout.links:
            return self._plain(tokens, layout, rows)
        cos, sin = self._decoder.rotary.rows(layout.positions, layout.longest, self._decoder.activation_dtype)
        out: Tensor = self._states(tokens, cos, sin, layout.cu_q, layout.longest, rows)
        return out

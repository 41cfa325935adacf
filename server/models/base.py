"""What the engine may ask of a diffusion model, whatever its family.

One bidirectional forward over packed canvases gives hidden states; the LM head, the widest product of all, runs only
on the rows that are asked for. Logits are always *for* a position: Dream's shift is hidden in here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from server.models.layers import RotaryTable
from server.models.packing import Attention, PackedLayout
from server.types import DecoderShape

Trunk = Callable[[Tensor, PackedLayout, Tensor | None], Tensor]
"""tokens (S,) int64, their layout, rows (N,) int64 or None -> final-norm states (N, d), or (S, d) without rows."""


class Backbone(Protocol):
    """A model without its head: its `forward` is a `Trunk`, made of what depends on the layout and of `states`.

    attention_backend: as `kernels.varlen.choose` gave it.
    """

    rotary: RotaryTable
    attention_backend: str

    @property
    def activation_dtype(self) -> torch.dtype:
        """What states are in."""

    def forward(self, tokens: Tensor, layout: PackedLayout, rows: Tensor | None) -> Tensor:
        """A `Trunk`."""

    def states(self, tokens: Tensor, cos: Tensor, sin: Tensor, attention: Attention, rows: Tensor | None) -> Tensor:
        """The same from rotations (S, 1, head_dim / 2) and attention: a function of tensors alone."""


class DiffusionModel(Protocol):
    """A masked diffusion LM on packed tokens. No torch.no_grad inside: callers decide.

    family: "dream" or "llada". vocab_size: V, the width of the logits (padding rows of the vocabulary included).
    shifts: whether the network's output at position i - 1 predicts position i (algorithm.md, section 1).
    """

    family: str
    shifts: bool
    vocab_size: int
    mask_token_id: int
    trunk: Trunk

    @property
    def backbone(self) -> Backbone:
        """Embeddings, blocks and final norm."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""

    @property
    def activation_dtype(self) -> torch.dtype:
        """What hidden states and logits are in: the weights' dtype, or float32 where the device has no instructions
        for a narrower one."""

    @property
    def shape(self) -> DecoderShape:
        """Sizes of the blocks."""

    def hidden(self, tokens: Tensor, layout: PackedLayout, rows: Tensor | None = None) -> Tensor:
        """Final-norm hidden states (S, d) of tokens (S,) int64; with `rows` (N,) only those packed indices (N, d)."""

    def masked_hidden(self, tokens: Tensor, layout: PackedLayout, rows: Tensor) -> Tensor:
        """What `head` turns into the logits for the tokens at packed indices `rows` (N,): (N, d). Kept in place of
        logits, which are V / d times as large, so that the head can run on some rows at a time."""

    def head(self, hidden: Tensor) -> Tensor:
        """(N, d) -> logits (N, V)."""

    def masked_logits(self, tokens: Tensor, layout: PackedLayout, rows: Tensor) -> Tensor:
        """Logits (N, V) for the tokens at packed indices `rows` (N,) int64."""


def source_rows(layout: PackedLayout, rows: Tensor, *, shifts: bool) -> Tensor:
    """The packed indices (N,) whose outputs predict `rows` (N,): with `shifts` the one before, within the sequence;
    a sequence's first position keeps its own."""
    if not shifts:
        return rows
    return rows - (layout.positions[rows] > 0).to(rows.dtype)

"""What the kernels work on: packed rows of logits with per-row parameters, and the state of one denoising step.

A *row* is one masked position of one trajectory. Rows of any requests share a batch, because every parameter that
differs between requests is a number in a row. phi, the logits being steered, never leaves the state: the operations
are the methods below, and each backend is one subclass of `Guided`.

    begin -> stats, draw, mix, update, stats, draw, mix, update, ... -> draw, filtered_stats

Shapes: N rows, V width of the logits, D hidden size of a reward model. The *compute dtype* is float64 for float64
logits and float32 for everything else.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8  # Adam's own defaults; the paper uses them


@dataclass(frozen=True, slots=True)
class RowParams:
    """Sampling and guidance parameters of N rows, on the logits' device; floats are in the compute dtype.

    `top_k` equal to V keeps every token, `top_p` of 1 or more too. A greedy row (temperature 0) has `tau` 1 and takes
    the argmax instead of a draw. `eta` is Adam's learning rate.
    """

    tau: Tensor  # (N,)
    top_p: Tensor  # (N,)
    top_k: Tensor  # (N,) int64
    greedy: Tensor  # (N,) bool
    eta: Tensor  # (N,)

    def select(self, rows: Tensor | slice) -> RowParams:
        """The parameters of some rows, (n,) int64."""
        return RowParams(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


@dataclass(frozen=True, slots=True)
class RowStats:
    """Statistics of the current phi, unfiltered, one number a row (N,); entropies in nats.

    `_1` is of softmax(phi), `_tau` of softmax(phi / tau). `argmax` (int64): the lowest id among equal values.
    """

    lse_1: Tensor
    lse_tau: Tensor
    entropy_1: Tensor
    entropy_tau: Tensor
    argmax: Tensor


@dataclass(frozen=True, slots=True)
class FilteredStats:
    """Of the filtered, renormalised distribution of algorithm.md 1.4, one number a drawn row (n,)."""

    neg_entropy: Tensor  # minus the entropy, nats
    token_probability: Tensor  # of the given token
    margin: Tensor  # largest minus second largest probability


@dataclass(frozen=True, slots=True)
class Mixed:
    """`soft` = softmax(phi / tau) @ table and `embeds` = soft + w (table[tokens] - soft), both (N, D)."""

    embeds: Tensor
    soft: Tensor


@dataclass(frozen=True, slots=True)
class Term:
    """One reward model's share of a gradient: `g` = dr/de (N, D), its `table` (V, D), and `soft` (N, D) from `mix`."""

    g: Tensor
    table: Tensor
    soft: Tensor


class Guided(ABC):
    """The state of one denoising step: phi and Adam's fresh moments. Backends implement the underscored methods;
    callers use the functions of the package, which check shapes first."""

    backend: str
    stats: RowStats  # of the current phi

    def __init__(self, logits: Tensor, params: RowParams, updates: int | None) -> None:
        if logits.ndim != 2 or 0 in logits.shape or not logits.is_floating_point():
            raise ValueError(f"logits must be a floating-point (N, V) tensor, not {logits.dtype} {tuple(logits.shape)}")
        for field in fields(params):
            value = getattr(params, field.name)
            if value.shape != logits.shape[:1] or value.device != logits.device:
                raise ValueError(f"params.{field.name} must have shape ({logits.shape[0]},) on {logits.device}")
        self.logits = logits.detach()
        self.params = params
        self.dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        self.expected_updates = updates
        self.updates = 0

    @property
    def rows(self) -> int:
        """N."""
        return self.logits.shape[0]

    @property
    def vocab_size(self) -> int:
        """V, the width of the logits."""
        return self.logits.shape[1]

    @abstractmethod
    def phi(self) -> Tensor:
        """The current phi (N, V) in the compute dtype. Do not write to it."""

    def split(self, at: int, updates: int | None = None) -> tuple[Guided, Guided]:
        """Two states, of the first `at` rows and of the others, in the memory of this one, which must not be used any
        more. `updates` is what `begin` was not told: how many updates in all the others get."""
        first, others = self._part(slice(0, at)), self._part(slice(at, None))
        others.expected_updates = self.expected_updates if updates is None else updates
        return first, others

    def greedy(self) -> Self:
        """A state in the memory of this one of which every row draws its best token."""
        whole = copy.copy(self)
        whole.params = replace(self.params, greedy=torch.ones_like(self.params.greedy))
        return whole._part(slice(None))

    def _part(self, rows: slice) -> Self:
        """A state of its own with the phi and Adam history of some rows, in the memory of this one."""
        part = copy.copy(self)
        part.logits, part.params = self.logits[rows], self.params.select(rows)
        return part

    @abstractmethod
    def _draw(self, keys: Tensor, rows: Tensor | None, never: int | None) -> Tensor: ...

    @abstractmethod
    def _filtered_stats(self, tokens: Tensor, rows: Tensor | None) -> FilteredStats: ...

    @abstractmethod
    def _mix(self, table: Tensor, tokens: Tensor, w: Tensor) -> Mixed: ...

    def _mix_into(self, table: Tensor, tokens: Tensor, w: Tensor, out: Tensor, place: Tensor) -> Tensor:
        mixed = self._mix(table, tokens, w)
        out[place] = mixed.embeds.to(out.dtype)
        return mixed.soft

    @abstractmethod
    def _update(self, terms: Sequence[Term]) -> None: ...

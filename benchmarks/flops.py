"""The cost model: floating-point operations of a run, counted from shapes, by phase.

Counted are the multiplications and additions of matrix products and attention, two operations a multiply-add; norms,
rotations, softmaxes and the passes over the vocabulary that are no products are not, so time spent there lowers the
utilisation. What is counted is what the work *needs*, whatever the code does: in its last layer a network needs
queries, output projections and MLPs only where it is read; causal attention needs its lower triangle; the backward
pass of a frozen network needs one product for each of the forward's (the gradient of its input) and no gradient at
all of cached keys and values. Sizes are read from the real calls of a run, so a saving that shrinks a call shrinks
its count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

import kernels
from server.models.base import DiffusionModel
from server.models.packing import PackedLayout
from server.rewards.reward_model import RewardModel
from server.types import DecoderShape

Note = Callable[..., Callable[["Flops"], None]]
"""The arguments of a watched call -> what adds its operations up later."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """Sizes of a stack of pre-norm blocks with SwiGLU: width d, H query and Hkv key heads of `size` channels."""

    hidden: int
    layers: int
    heads: int
    key_heads: int
    size: int
    intermediate: int

    @classmethod
    def of(cls, shape: DecoderShape) -> Decoder:
        """The sizes that a diffusion or reward model says it has."""
        return cls(shape.hidden, shape.layers, shape.heads, shape.key_heads, shape.head_size, shape.intermediate)

    def queries(self, tokens: int) -> int:
        """Query and output projections and the MLP of one layer: what only tokens that are read later need."""
        return 2 * tokens * self.hidden * (2 * self.heads * self.size + 3 * self.intermediate)

    def keys(self, tokens: int) -> int:
        """Key and value projections of one layer."""
        return 4 * tokens * self.hidden * self.key_heads * self.size

    def attention(self, pairs: int) -> int:
        """Scores and weighted sums of one layer, for that many (query, key) pairs."""
        return 4 * pairs * self.heads * self.size

    def products(self, tokens: int, read: int) -> int:
        """All projections and MLPs when `read` of the tokens are read after the last layer."""
        return self.layers * self.keys(tokens) + (self.layers - 1) * self.queries(tokens) + self.queries(read)


def diffusion_attention(decoder: Decoder, lengths: Sequence[int], read: Sequence[int]) -> int:
    """Bidirectional attention within sequences of these lengths, of which `read` tokens each are read."""
    whole = sum(length * length for length in lengths)
    last = sum(length * rows for length, rows in zip(lengths, read, strict=True))
    return decoder.attention((decoder.layers - 1) * whole + last)


def causal_pairs(prefixes: Sequence[int], lengths: Sequence[int]) -> tuple[int, int]:
    """(query, key) pairs of rows that continue cached prefixes: with the prefix, and among the rows' own tokens."""
    cached = sum(prefix * length for prefix, length in zip(prefixes, lengths, strict=True))
    return cached, sum(length * (length + 1) // 2 for length in lengths)


def reward_forward(decoder: Decoder, prefixes: Sequence[int], lengths: Sequence[int]) -> int:
    """Operations of a pass that reads one number from each row, at its last token."""
    cached, own = causal_pairs(prefixes, lengths)
    last = sum(prefixes) + sum(lengths)
    pairs = (decoder.layers - 1) * (cached + own) + last
    read = len(lengths)
    return decoder.products(sum(lengths), read) + decoder.attention(pairs) + 2 * read * decoder.hidden


def reward_backward(decoder: Decoder, prefixes: Sequence[int], lengths: Sequence[int]) -> int:
    """Operations of the way back, from the reward to the rows' own embeddings: a product for each of the forward's; in
    attention two for every pair with a cached key (of the weights and of the query) and four for every other (of the
    key and the value as well)."""
    cached, own = causal_pairs(prefixes, lengths)
    read = len(lengths)
    last_own = sum(lengths)
    pairs = (decoder.layers - 1) * (cached + 2 * own) + sum(prefixes) + 2 * last_own
    return decoder.products(sum(lengths), read) + decoder.attention(pairs) + 2 * read * decoder.hidden


def reward_prefix(decoder: Decoder, prefixes: Sequence[int], lengths: Sequence[int]) -> int:
    """Keys and values of every layer for tokens that no reward is read at."""
    cached, own = causal_pairs(prefixes, lengths)
    return decoder.products(sum(lengths), 0) + decoder.attention((decoder.layers - 1) * (cached + own))


def vocabulary_product(rows: int, vocab_size: int, width: int) -> int:
    """The LM head, the mixing of embeddings (q @ E) or the gradient of the logits (g @ E.T)."""
    return 2 * rows * vocab_size * width


@dataclass(slots=True)
class Flops:
    """Operations of a run: the diffusion model's trunk, attention and head; q @ E and g @ E.T; the reward model's
    forward passes (final scoring included), backward passes, and cached prefixes."""

    trunk: int = 0
    attention: int = 0
    head: int = 0
    mix: int = 0
    update: int = 0
    reward_forward: int = 0
    reward_backward: int = 0
    reward_prefix: int = 0

    @property
    def total(self) -> int:
        """The operations of all kinds together."""
        return sum(asdict(self).values())

    def plus(self, other: Flops) -> Flops:
        """The sum, kind by kind."""
        theirs = asdict(other)
        return Flops(**{name: value + theirs[name] for name, value in asdict(self).items()})

    def by_phase(self) -> dict[str, int]:
        """The operations under the names of the phases that the engine times."""
        return {
            "diffusion": self.trunk + self.attention + self.head,
            "vocabulary": self.mix + self.update,
            "reward forward": self.reward_forward + self.reward_prefix,
            "reward backward": self.reward_backward,
        }


@dataclass(slots=True)
class Recorder:
    """Calls as they come, counted afterwards: reading sizes from a device would make it wait. `prefix_seconds` is the
    time inside the reward model's `extend`."""

    pending: list[Callable[[Flops], None]] = field(default_factory=list)
    prefix_seconds: float = 0.0

    def count(self) -> Flops:
        """Operations of all calls so far."""
        flops = Flops()
        for each in self.pending:
            each(flops)
        return flops


@contextmanager
def recording(model: DiffusionModel, reward: RewardModel | None) -> Iterator[Recorder]:
    """Watch a diffusion model, a reward model and the kernels while a run goes on; `count()` afterwards."""
    recorder = Recorder()
    with ExitStack() as stack:
        stack.enter_context(_watched(model, "hidden", _diffusion_hidden(model), recorder))
        stack.enter_context(_watched(model, "head", _diffusion_head(model), recorder))
        stack.enter_context(_watched(kernels, "mix", _mix, recorder))
        stack.enter_context(_watched(kernels, "update", _update, recorder))
        if reward is not None:
            decoder = Decoder.of(reward.shape)
            stack.enter_context(_watched(reward, "read", _reward_read(decoder), recorder))
            stack.enter_context(_watched(reward, "read_with_gradient", _reward_read(decoder, back=True), recorder))
            stack.enter_context(_watched(reward, "extend", _reward_extended(decoder), recorder))
        yield recorder


@contextmanager
def _watched(owner: Any, name: str, note: Note, recorder: Recorder) -> Iterator[None]:
    original = getattr(owner, name)
    own = name in vars(owner)

    def call(*args: Any, **kwargs: Any) -> Any:
        recorder.pending.append(note(*args, **kwargs))
        started = time.perf_counter()
        result = original(*args, **kwargs)
        if name == "extend":
            recorder.prefix_seconds += time.perf_counter() - started
        return result

    setattr(owner, name, call)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)


def _diffusion_hidden(model: DiffusionModel) -> Note:
    decoder = Decoder.of(model.shape)

    def note(tokens: torch.Tensor, layout: Any, rows: torch.Tensor | None = None) -> Callable[[Flops], None]:
        lengths = layout.lengths

        def add(flops: Flops) -> None:
            read = list(lengths)
            if rows is not None:
                ends = np.cumsum(lengths)
                # Only different rows are needed: with Dream's shift two positions may read the same one.
                owners = np.searchsorted(ends, np.unique(rows.cpu().numpy()), side="right")
                read = np.bincount(owners, minlength=len(lengths)).tolist()
            flops.trunk += decoder.products(sum(lengths), sum(read))
            flops.attention += diffusion_attention(decoder, lengths, read)

        return add

    return note


def _diffusion_head(model: DiffusionModel) -> Note:
    def note(hidden: torch.Tensor) -> Callable[[Flops], None]:
        rows, width = hidden.shape

        def add(flops: Flops) -> None:
            flops.head += vocabulary_product(rows, model.vocab_size, width)

        return add

    return note


def _mix(state: kernels.Guided, table: torch.Tensor, *_: Any, **__: Any) -> Callable[[Flops], None]:
    rows, (vocab_size, width) = state.rows, table.shape

    def add(flops: Flops) -> None:
        flops.mix += vocabulary_product(rows, vocab_size, width)

    return add


def _update(state: kernels.Guided, terms: Sequence[kernels.Term]) -> Callable[[Flops], None]:
    count = state.rows
    shapes = [term.table.shape for term in terms]

    def add(flops: Flops) -> None:
        flops.update += sum(vocabulary_product(count, vocab_size, width) for vocab_size, width in shapes)

    return add


def _reward_read(decoder: Decoder, *, back: bool = False) -> Note:
    def note(layout: PackedLayout, embeds: torch.Tensor) -> Callable[[Flops], None]:
        prefixes, lengths = [prefix.length for prefix in layout.prefixes], layout.lengths

        def add(flops: Flops) -> None:
            flops.reward_forward += reward_forward(decoder, prefixes, lengths)
            if back:
                flops.reward_backward += reward_backward(decoder, prefixes, lengths)

        return add

    return note


def _reward_extended(decoder: Decoder) -> Note:
    def note(layout: PackedLayout, embeds: torch.Tensor) -> Callable[[Flops], None]:
        prefixes, lengths = [prefix.length for prefix in layout.prefixes], layout.lengths

        def add(flops: Flops) -> None:
            flops.reward_prefix += reward_prefix(decoder, prefixes, lengths)

        return add

    return note

"""What all families of diffusion models share, and all that the engine may ask of one.

One forward over packed canvases gives hidden states; the LM head, the widest product of all, runs only on the rows that
are asked for. Logits are always *for* a position: Dream's shift is hidden in here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from kernels.linear import linear
from kernels.transfer import upload_all
from server.diffusion.schedule import block_lengths
from server.models.config import ConfigReader
from server.models.layers import Decoder, DecoderConfig, Linear, RopeScaling, Variant
from server.models.packing import EMPTY_PREFIX, Attention, Kept, PackedLayout, Prefix, attend, grown, places
from server.types import BlocksFrom

if TYPE_CHECKING:
    from server.models.lora import Adapter

Trunk = Callable[[Tensor, PackedLayout, Tensor | None], Tensor]
"""tokens (S,) int64, their layout, rows (N,) int64 or None -> final-norm states (N, d), or (S, d) without rows."""

PREFILL_KEYS = 1 << 16
"""Keys of one forward of a prompt, counted once for each block that sees them."""


class DiffusionModel(nn.Module):
    """A masked diffusion LM on packed tokens. No torch.no_grad inside: callers decide, and models can be trained.

    A family is a subclass: its name, the name that its checkpoints have in `architectures`, the hub ids of the
    published ones, whether the network's output at i - 1 predicts position i (`shifts`; algorithm.md, section 1), how
    its blocks differ from plain Llama's, how its config.json and its tensors differ from Qwen2's, and which of a
    request's defaults are its own. Tied embeddings are one parameter. `trunk` is the forward of embeddings
    and blocks, for which `models.acceleration` may put something faster. `vocab_size` is V, the width of the logits,
    padding rows of the vocabulary included.
    """

    family: ClassVar[str]
    architecture: ClassVar[str]
    published: ClassVar[tuple[str, ...]] = ()
    shifts: ClassVar[bool] = False
    variant: ClassVar[Variant] = Variant()
    fixed: ClassVar[Mapping[str, tuple[object, ...]]] = {}  # keys of config.json, and all that we implement of each
    keys: ClassVar[Mapping[str, str]] = {}  # Qwen2's keys of config.json, and what the family calls them
    stored_names: ClassVar[tuple[tuple[str, str], ...]] = ()  # pieces of our parameters' names and of the published
    diffusion_defaults: ClassVar[Mapping[str, str | int]] = {}  # where a request says nothing
    template_arguments: ClassVar[Mapping[str, bool]] = {}  # likewise
    block_causal: ClassVar[bool] = False  # whether every checkpoint is
    blocks_from: ClassVar[BlocksFrom] = "prompt_end"  # where those that are count their blocks from
    block_lengths: ClassVar[Mapping[str, int]] = {}  # of published ones that are, where config.json does not say it

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = self.shape = config
        self.vocab_size = config.vocab_size
        self.mask_token_id = config.mask_token_id
        self.context_length = config.context_length
        self.model = Decoder(config, self.variant)
        self.trunk: Trunk = self.plain_trunk
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden, config.vocab_size, bias=False)

    @classmethod
    def read_config(cls, raw: Mapping[str, Any]) -> DecoderConfig:
        """A parsed config.json. Raises ConfigurationError for what is missing, wrong or not implemented."""
        read = ConfigReader(raw, names=cls.keys)
        width, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
        key_heads, layers = read.integer("num_key_value_heads", heads), read.integer("num_hidden_layers")
        every = {"quantization_config": (), "layer_types": (["full_attention"] * layers,)}
        for key, allowed in {**every, **cls.fixed}.items():
            read.require(key, *allowed)
        if raw.get("head_dim") is None:
            read.multiple("hidden_size", width, f"2 * {read.name('num_attention_heads')}", 2 * heads)
        head_size = read.integer("head_dim", width // heads)
        read.multiple("head_dim", head_size, "channels that rotate together", 2)
        read.multiple("num_attention_heads", heads, read.name("num_key_value_heads"), key_heads)
        rope_theta, rope_scaling = read.rope(10000.0)
        return DecoderConfig(
            hidden=width,
            intermediate=read.integer("intermediate_size"),
            heads=heads,
            key_heads=key_heads,
            head_size=head_size,
            layers=layers,
            vocab_size=read.integer("vocab_size"),
            rms_norm_eps=read.number("rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            rope_scaling=None if rope_scaling is None else RopeScaling(*rope_scaling),
            mask_token_id=read.integer("mask_token_id", minimum=0),
            context_length=read.integer("max_position_embeddings"),
            tie_word_embeddings=read.flag("tie_word_embeddings", False),
        )

    @classmethod
    def stored_name(cls, name: str) -> str:
        """What published checkpoints call a parameter."""
        for ours, published in cls.stored_names:
            name = name.replace(ours, published)
        return name

    @property
    def ignored_weights(self) -> tuple[str, ...]:
        """Stored tensors that may be left over: some checkpoints with tied embeddings store them twice."""
        return (self.stored_name("lm_head.weight"),) if self.config.tie_word_embeddings else ()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return self.model.embed_tokens.weight.dtype

    @property
    def activation_dtype(self) -> torch.dtype:
        """What hidden states and logits are in, see `Embedding.activation_dtype`."""
        return self.model.embed_tokens.activation_dtype

    def plain_trunk(
        self, tokens: Tensor, layout: PackedLayout, rows: Tensor | None, kept: Kept | None = None
    ) -> Tensor:
        """The `Trunk` as it is written; it can also leave some tokens' keys and values in `kept`."""
        x, cos, sin, attention = self._inputs(tokens, layout)
        return self.model.states(x, cos, sin, attention if kept is None else kept.during(attention), rows, layout.runs)

    def _inputs(self, tokens: Tensor, layout: PackedLayout) -> tuple[Tensor, Tensor, Tensor, Attention]:
        """What all of the decoder's ways through it begin with: stream, cosines, sines (S, size / 2), attention."""
        cos, sin = self.model.rotary.rows(layout.positions, layout.longest_keys, self.activation_dtype)
        return self.model.embed_tokens(tokens), cos, sin, partial(attend, layout, backend=self.model.attention_backend)

    @torch.no_grad()
    def prefill(
        self, prompts: Sequence[Sequence[int]], lengths: Sequence[int], adapters: Sequence[Adapter | None]
    ) -> list[Prefix]:
        """Run block-causal prompts once: of each the tokens of whole blocks of its length, the last of which ends with
        them. Blocks of all prompts go together, as many as have some `PREFILL_KEYS` keys, for an attention may lay out
        the keys of each block."""
        prefixes = [EMPTY_PREFIX for _ in prompts]
        left = [
            list(block_lengths(len(ids), len(ids), n)) if ids else [] for ids, n in zip(prompts, lengths, strict=True)
        ]
        while any(left):
            rows, keys = list[tuple[int, list[int]]](), 0
            for index, blocks in enumerate(left):
                taken, end = list[int](), prefixes[index].length
                while blocks and keys < PREFILL_KEYS:
                    taken.append(blocks.pop(0))
                    end += taken[-1]
                    keys += end
                if taken:
                    rows.append((index, taken))
            layout = PackedLayout.of(
                [length for _, taken in rows for length in taken],
                prefixes=[prefixes[index] for index, taken in rows for _ in taken],
                before=[place for _, taken in rows for place in places(taken)],
                adapters=[adapters[index] for index, taken in rows for _ in taken],
            )
            done = [prefixes[index] for index, _ in rows]
            counts = [sum(taken) for _, taken in rows]
            ids = [
                token
                for (index, _), prefix, count in zip(rows, done, counts, strict=True)
                for token in prompts[index][prefix.length : prefix.length + count]
            ]
            layout, tokens = upload_all([layout, torch.tensor(ids)], self.device)
            captured = self.model.keys_and_values(*self._inputs(tokens, layout), layout.runs)
            for (index, _), prefix in zip(rows, grown(done, counts, captured), strict=True):
                prefixes[index] = prefix
        return [prefix.joined() for prefix in prefixes]

    def hidden(self, tokens: Tensor, layout: PackedLayout, rows: Tensor | None = None) -> Tensor:
        """Final-norm hidden states (S, d) of tokens (S,) int64; with `rows` (N,) only those packed indices (N, d)."""
        return self.trunk(tokens, layout, rows)

    def head(self, hidden: Tensor) -> Tensor:
        """(N, d) -> logits (N, V), unshifted."""
        tied = self.config.tie_word_embeddings
        return linear(hidden, self.model.embed_tokens.weight if tied else self.lm_head.weight)

    def masked_hidden(self, tokens: Tensor, layout: PackedLayout, rows: Tensor, kept: Kept | None = None) -> Tensor:
        """What `head` turns into the logits for the tokens at packed indices `rows` (N,): (N, d), in place of logits,
        which are V / d times as large, so that the head can run on some rows at a time. Keys and values that are wanted
        are left in `kept`."""
        if self.shifts:  # a row's first position keeps its own output
            rows = rows - (layout.positions[rows] > 0).to(rows.dtype)
        return self.hidden(tokens, layout, rows) if kept is None else self.plain_trunk(tokens, layout, rows, kept)

    def masked_logits(self, tokens: Tensor, layout: PackedLayout, rows: Tensor) -> Tensor:
        """Logits (N, V) for the tokens at packed indices `rows` (N,) int64."""
        return self.head(self.masked_hidden(tokens, layout, rows))

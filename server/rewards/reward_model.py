"""A reward model R: a published sequence classifier with one label, run by transformers, with attention of our own.

R reads tokens or embeddings and gives one number, read at the last token. Guidance needs dR/de for many short,
ragged responses whose conversations never change while they are generated; so rows are packed, not padded, and each
conversation is run once (`prefill`) and reused by all rows that continue it, exactly.

Weights are frozen: the only gradient that ever flows is the one to the embeddings that a caller passes in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from kernels import varlen
from kernels.linear import activation_dtype
from kernels.transfer import upload
from server.errors import ConfigurationError
from server.hub import read_json, resolve_checkpoint
from server.rewards.attention import EMPTY_PREFIX, Packing, Prefix
from server.rewards.network import check_config, load_network
from server.rewards.trunk import Trunk
from server.rewards.vocab_map import VocabFallback, VocabMap, map_vocabulary
from server.text.template import conversation_ids
from server.text.tokenizer import Tokenizer
from server.types import DecoderShape, Message, RewardModelInfo

__all__ = ["Packing", "Prefix", "RewardModel", "RewardRows", "load_reward_model"]

SCORE_TOKENS = 8192
"""Tokens that `score` runs in one forward; a longer sequence goes alone."""

MIN_SHARED_TOKENS = 16
"""A shorter common beginning is not worth a forward of its own."""


@dataclass(frozen=True, slots=True)
class RewardRows:
    """B packed rows: what each continues, how many tokens of its own it has, and their S absolute positions (S,).

    Rows of one request name the same `Prefix` object. Positions may have gaps, where hidden tokens were left out.
    """

    prefixes: tuple[Prefix, ...]
    lengths: tuple[int, ...]
    positions: Tensor


class Passes(Protocol):
    """What runs passes, forward and back, at less cost than kernel by kernel: `rewards.graphs`."""

    def takes(self, packing: Packing) -> bool:
        """Whether `run` can take these rows."""

    def run(self, packing: Packing, positions: Tensor, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards (B,) and their sum's gradient (S, D)."""


class RewardModel:
    """A loaded reward model. `table` (V, D) holds its embeddings by diffusion-model id.

    The table may be on another device than the model, `table_device`: that of the diffusion model's logits. Embeddings
    are then mixed there, and they, the rewards and the gradient cross between the devices in `forward`.
    """

    def __init__(
        self,
        name: str,
        network: Any,
        tokenizer: Tokenizer,
        vocab_map: VocabMap,
        info: RewardModelInfo,
        table_device: torch.device | None = None,
    ) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.info = info
        self._network = network
        self._base = getattr(network, network.base_model_prefix)
        self._trunk = Trunk.of(self._base)
        self._embed = network.get_input_embeddings()
        self.device: torch.device = self._embed.weight.device
        self.dtype: torch.dtype = self._embed.weight.dtype
        self._reward_dtype: torch.dtype = next(network.score.parameters()).dtype
        self.hidden_size: int = self._embed.weight.shape[1]
        self.activation_dtype = self.dtype if self._trunk is None else activation_dtype(self.dtype, self.device)
        where = self.device, self.activation_dtype, self.shape.head_size
        self.attention_backend = varlen.choose("auto", *where)
        self.graphed_passes: Passes | None = None
        self.table = self._table(vocab_map).to(table_device or self.device)

    @property
    def written_out(self) -> bool:
        """Whether `trunk` runs the blocks; else transformers does, which keeps more for the way back."""
        return self._trunk is not None

    @property
    def shape(self) -> DecoderShape:
        """Sizes of the blocks; where the configuration does not say, as if every head had its own keys and the MLP
        were four times as wide as the stream."""
        config = self._network.config.get_text_config()
        heads = config.num_attention_heads
        return DecoderShape(
            hidden=self.hidden_size,
            intermediate=getattr(config, "intermediate_size", None) or 4 * self.hidden_size,
            heads=heads,
            key_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_size=getattr(config, "head_dim", None) or self.hidden_size // heads,
            layers=config.num_hidden_layers,
        )

    @property
    def reads_lengths_on_device(self) -> bool:
        """Whether rows may end where only the device knows (`Packing.hiding`): with a kernel of `kernels.varlen`."""
        return self.attention_backend not in ("sdpa", "cpp")

    def own_embeddings(self, ids: Tensor) -> Tensor:
        """Embeddings (n, D) of reward-vocabulary ids (n,) int64; no gradient."""
        with torch.no_grad():
            embeds: Tensor = self._embed(upload(ids, self.device))
        return embeds

    def prefill(self, prefix_ids: Sequence[int]) -> Prefix:
        """Run the tokens (reward-vocabulary ids) in front of a response once; positions count from 0."""
        if not prefix_ids:
            return EMPTY_PREFIX
        embeds = self.own_embeddings(torch.tensor(prefix_ids, dtype=torch.long))
        rows = RewardRows((EMPTY_PREFIX,), (len(prefix_ids),), torch.arange(len(prefix_ids), device=self.device))
        return self.extend(rows, embeds)[0]

    def extend(self, rows: RewardRows, embeds: Tensor) -> tuple[Prefix, ...]:
        """Each row's prefix with the row's own tokens, embeds (S, D), behind it: B new prefixes, no gradient.

        Exact: a row over the longer prefix reads the same reward. It is for tokens that will not change any more.
        A prefix's `length` counts its tokens; with gaps in the positions the next one is the caller's to know.
        """
        packing = Packing.of(rows.prefixes, rows.lengths, self.device, capture=True, backend=self.attention_backend)
        self._check(rows.positions, embeds)
        with torch.no_grad():
            positions, embeds = self._here(rows.positions, embeds)
            if self._trunk is None:
                self._hidden(packing, positions, embeds)
            else:
                pairs = self._trunk.keys_and_values(packing, positions, embeds)
                packing.keep((k.transpose(0, 1), v.transpose(0, 1)) for k, v in pairs)
        return tuple(
            packing.captured(row, length, prefix)
            for row, (length, prefix) in enumerate(zip(rows.lengths, rows.prefixes, strict=True))
        )

    def forward(self, rows: RewardRows, embeds: Tensor) -> Tensor:
        """Rewards (B,) of packed rows, embeds (S, D) in the model's dtype, each read at its row's last token.

        The rewards are in float32, or float64 for a float64 model, on the device of `embeds`.

        Differentiable with respect to `embeds` alone. ValueError when the shapes do not fit or a row is empty.
        """
        return self.read(self.packing(rows.prefixes, rows.lengths), rows.positions, embeds)

    def packing(self, prefixes: Sequence[Prefix], lengths: Sequence[int]) -> Packing:
        """How `read` takes B rows of `lengths` own tokens. ValueError for an empty row or none."""
        return Packing.of(prefixes, lengths, self.device, backend=self.attention_backend)

    def read(self, packing: Packing, positions: Tensor, embeds: Tensor) -> Tensor:
        """`forward` of rows that are packed already, at absolute positions (S,)."""
        self._check(positions, embeds)
        positions, x = self._here(positions, embeds)
        if self._trunk is None:
            last_hidden = self._hidden(packing, positions, x).index_select(0, packing.lasts)
        else:
            last_hidden = self._trunk.last_hidden(packing, positions, x)
        rewards: Tensor = self._network.score(last_hidden.to(self._reward_dtype))
        return rewards[:, 0].to(embeds.device)

    def score(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Rewards (B,) of whole token sequences, each of one token at least; no gradient, order kept.

        Sequences of similar length are run together, at most `SCORE_TOKENS` tokens at a time.
        """
        rewards = torch.zeros(len(sequences), dtype=self._reward_dtype, device=self.device)
        order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
        chunk: list[int] = []
        with torch.no_grad():
            for place, index in enumerate(order):
                chunk.append(index)
                after = place + 1 < len(order) and len(sequences[order[place + 1]])
                if not after or (len(chunk) + 1) * after > SCORE_TOKENS:
                    rewards[torch.tensor(chunk, device=self.device)] = self._score([sequences[i] for i in chunk])
                    chunk = []
        return rewards

    def score_text(self, conversation: Sequence[Message], response: str) -> float:
        """The final reward of a response: R on the rendered conversation, tokenised at once (section 2, end)."""
        return float(self.score([conversation_ids(self.tokenizer, conversation, response)])[0])

    def _score(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Rewards (B,) of one pack. What all of its sequences begin with is run once."""
        shared = _common_prefix(sequences)
        prefix = self.prefill(sequences[0][:shared]) if shared >= MIN_SHARED_TOKENS else EMPTY_PREFIX
        own = [sequence[prefix.length :] for sequence in sequences]
        lengths = tuple(len(ids) for ids in own)
        ids = torch.tensor([token for sequence in own for token in sequence], dtype=torch.long)
        positions = torch.cat([torch.arange(prefix.length, prefix.length + length) for length in lengths])
        rows = RewardRows((prefix,) * len(sequences), lengths, positions.to(self.device))
        return self.forward(rows, self.own_embeddings(ids))

    def _here(self, positions: Tensor, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Both on the model's device, the embeddings in the dtype that it computes in."""
        return positions.to(self.device), embeds.to(self.device, self.activation_dtype)

    def _check(self, positions: Tensor, embeds: Tensor) -> None:
        if embeds.shape != (len(positions), self.hidden_size):
            raise ValueError(f"embeds {tuple(embeds.shape)} for {len(positions)} positions of {self.hidden_size}")

    def _hidden(self, packing: Packing, positions: Tensor, embeds: Tensor) -> Tensor:
        """Final-norm hidden states (S, D) of packed rows, as transformers runs the model."""
        output = self._base(
            inputs_embeds=embeds[None],
            attention_mask=None,
            position_ids=positions[None],
            use_cache=False,
            packing=packing,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden[0]

    def _table(self, vocab_map: VocabMap) -> Tensor:
        ids = torch.tensor(vocab_map.ids, dtype=torch.long)
        table = self.own_embeddings(ids.clamp_min(0))
        return table.masked_fill_((ids < 0).to(self.device)[:, None], 0.0)


def _common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many first tokens all of several sequences share, leaving each at least one of its own; 0 for one alone."""
    if len(sequences) < 2:
        return 0
    shared = min(map(len, sequences)) - 1
    for sequence in sequences[1:]:
        shared = next((at for at in range(shared) if sequence[at] != sequences[0][at]), shared)
    return shared


def load_reward_model(
    name: str,
    path_or_id: str | Path,
    *,
    diffusion_tokenizer: Tokenizer,
    diffusion_vocab_size: int,
    dtype: torch.dtype,
    device: torch.device,
    vocab_fallback: VocabFallback = "unk",
    table_device: torch.device | None = None,
) -> RewardModel:
    """Load a reward model (a folder, `owner/name` or `owner/name@revision`) and map its vocabulary.

    `diffusion_vocab_size` is V, the width of the diffusion model's logits; `table_device` is where those are, when not
    on `device`. Raises ConfigurationError, whose message
    names the reward model and the key, file or setting that is wrong.
    """
    try:
        folder = resolve_checkpoint(path_or_id, check_config=check_config)
        check_config(read_json(folder / "config.json"))
        tokenizer = Tokenizer.load(folder, f"reward model {name}")
        if not tokenizer.has_chat_template:
            raise ConfigurationError("chat_template: there is none, in chat_template.jinja or tokenizer_config.json")
        vocab_map = map_vocabulary(name, diffusion_tokenizer, tokenizer, diffusion_vocab_size, vocab_fallback)
        network = load_network(folder, dtype=dtype, device=device)
        rows = network.get_input_embeddings().weight.shape[0]
        if max(vocab_map.ids) >= rows:
            raise ConfigurationError(
                f"vocab_size: the tokenizer has id {max(vocab_map.ids)}, the embeddings {rows} rows"
            )
    except ConfigurationError as error:
        raise ConfigurationError(f"reward model {name}: {error}") from error
    config = network.config.get_text_config()
    info = RewardModelInfo(
        id=name,
        family=config.model_type,
        context_length=config.max_position_embeddings,
        vocab_coverage=vocab_map.coverage,
        vocab_fallback=vocab_fallback,
        dtype=str(dtype).removeprefix("torch."),
    )
    return RewardModel(name, network, tokenizer, vocab_map, info, table_device)

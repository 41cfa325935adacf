"""A reward model R: a published sequence classifier of causal attention, with attention of our own.

R reads tokens or embeddings and gives one number: the one logit of its head, or of a classifier with several labels
what `labels.Reading` makes of them. It is read at the last token that is not padding (the
configuration's `pad_token_id`), as transformers reads it; without a `pad_token_id`, at the last. Guidance needs dR/de
for many short, ragged responses whose conversations never change while they are generated; so rows are packed, not
padded, and each conversation is run once (`prefill`) and reused by all rows that continue it, exactly.

Weights are frozen: the only gradient that ever flows is the one to the embeddings that a caller passes in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kernels import varlen
from kernels.linear import activation_dtype, linear
from kernels.transfer import upload
from server.errors import ConfigurationError
from server.models.packing import EMPTY_PREFIX, PackedLayout, Prefix, grown
from server.rewards.classifier import Classifier, blaming
from server.rewards.labels import ONE_LABEL, Reading
from server.rewards.network import check_tokens, learned_positions, load_causal
from server.rewards.text_reward import SCORE_TOKENS, check_length, packs
from server.rewards.trunk import shape_of, trunk_of
from server.rewards.vocab_map import VocabFallback, map_vocabulary
from server.text.template import conversation_ids, split_at_response
from server.text.tokenizer import Tokenizer
from server.types import Message, RewardModelInfo

if TYPE_CHECKING:
    from server.rewards.graphs import GraphedPasses

MIN_SHARED_TOKENS = 16
"""A shorter common beginning is not worth a forward of its own."""


class RewardModel:
    """A loaded reward model. `table` (V, D) holds its embeddings by diffusion-model id; `padding` (V,) bool, which is
    `padding_on_host` too, says which of these ids are its padding. `pad_token_id` is None where nothing is.

    The table may be on another device than the model, `table_device`: that of the diffusion model's logits. Embeddings
    are then mixed there, and they, the rewards and the gradient cross between the devices in `read`.
    """

    def __init__(
        self,
        name: str,
        network: Any,
        tokenizer: Tokenizer,
        ids_by_string: Sequence[int],
        info: RewardModelInfo,
        table_device: torch.device | None = None,
        reading: Reading = ONE_LABEL,
    ) -> None:
        self.name = name
        self.reading = reading
        self.tokenizer = tokenizer
        self.info = info
        self._network = network
        self._trunk = trunk_of(getattr(network, network.base_model_prefix))
        self._embed = network.get_input_embeddings()
        self.device: torch.device = self._embed.weight.device
        self._reward_dtype: torch.dtype = next(network.score.parameters()).dtype
        self.hidden_size: int = self._embed.weight.shape[1]
        self.shape = shape_of(network.config.get_text_config())
        own: torch.dtype = self._embed.weight.dtype
        self.activation_dtype = activation_dtype(own, self.device) if self.written_out else own
        self.attention_backend = varlen.choose("auto", self.device, self.activation_dtype, self.shape.head_size)
        self.graphed_passes: GraphedPasses | None = None
        self._longest = None if self.written_out else learned_positions(network)
        pad = network.config.get_text_config().pad_token_id
        self.pad_token_id: int | None = pad if pad is not None and pad >= 0 else None
        ids = torch.tensor(ids_by_string)
        unknown = (ids < 0).to(self.device)[:, None]  # read as a zero vector
        self.table = self.own_embeddings(ids.clamp_min(0)).masked_fill_(unknown, 0.0).to(table_device or self.device)
        padding = ids == self.pad_token_id if self.pad_token_id is not None else torch.zeros_like(ids, dtype=torch.bool)
        self.padding, self.padding_on_host = padding.to(self.table.device), padding.numpy()

    @property
    def written_out(self) -> bool:
        """Whether our own layers run the blocks; else transformers does, which keeps more for the way back."""
        return self._trunk.written_out

    @property
    def reads_lengths_on_device(self) -> bool:
        """Whether rows may end where only the device knows (`PackedLayout.hiding`): with a kernel of
        `kernels.varlen`."""
        return self.attention_backend not in ("sdpa", "cpp")

    def own_embeddings(self, ids: Tensor) -> Tensor:
        """Embeddings (n, D) of reward-vocabulary ids (n,) int64; no gradient."""
        with torch.no_grad():
            embeds: Tensor = self._embed(upload(ids, self.device))
        return embeds

    def content(self, ids: Sequence[int]) -> int:
        """How many first tokens of reward-vocabulary ids (n,) there are up to the last one that is not padding."""
        return next((end for end in range(len(ids), 0, -1) if ids[end - 1] != self.pad_token_id), 0)

    def layout(
        self, prefixes: Sequence[Prefix], lengths: Sequence[int], positions: Tensor | None = None
    ) -> PackedLayout:
        """B rows of `lengths` own tokens at absolute positions (S,), each after its prefix. Positions may have gaps,
        where hidden tokens were left out; without them they count on. ValueError for an empty row or none."""
        return PackedLayout.of(lengths, self.device, prefixes=prefixes, positions=positions, causal=True)

    def prefill(self, prefix_ids: Sequence[int]) -> Prefix:
        """Run the tokens (reward-vocabulary ids) in front of a response once; positions count from 0."""
        return self.prefill_all([prefix_ids])[0]

    def prefill_all(self, sequences: Sequence[Sequence[int]]) -> list[Prefix]:
        """The same for several, in one pass for every `SCORE_TOKENS` tokens; equal ones are one prefix."""
        found = {(): EMPTY_PREFIX} | {tuple(ids): EMPTY_PREFIX for ids in sequences}
        chunk: list[tuple[int, ...]] = []
        distinct = [ids for ids in found if ids]
        for place, ids in enumerate(distinct):
            chunk.append(ids)
            tokens = [token for each in chunk for token in each]
            if place + 1 == len(distinct) or len(tokens) + len(distinct[place + 1]) > SCORE_TOKENS:
                layout = self.layout((EMPTY_PREFIX,) * len(chunk), [len(each) for each in chunk])
                found.update(zip(chunk, self.extend(layout, self.own_embeddings(torch.tensor(tokens))), strict=True))
                chunk = []
        return [found[tuple(ids)] for ids in sequences]

    def extend(self, layout: PackedLayout, embeds: Tensor) -> tuple[Prefix, ...]:
        """Each row's prefix with the row's own tokens, embeds (S, D), after it: B new prefixes, no gradient.

        Exact: a row over the longer prefix reads the same reward. It is for tokens that will not change any more.
        A prefix's `length` counts its tokens; with gaps in the positions the next one is the caller's to know.
        """
        with torch.no_grad():
            captured = self._trunk.keys_and_values(layout, self._here(layout, embeds), self.attention_backend)
            return grown(layout.prefixes, layout.lengths, captured)

    def read(self, layout: PackedLayout, embeds: Tensor) -> Tensor:
        """Rewards (B,) of packed rows, embeds (S, D), each read at its row's last token.

        They are in float32, or float64 for a float64 model, on the device of `embeds`. Differentiable with respect to
        `embeds` alone. ValueError when the shapes do not fit.
        """
        return self._rewards(layout, self._here(layout, embeds)).to(embeds.device)

    def read_with_gradient(self, layout: PackedLayout, embeds: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
        """The same rewards, detached, and what computes the gradient (S, D) of their sum, once, on the device and in
        the dtype of `embeds`. Rewards are independent of each other, so it holds each row's own."""
        x = self._here(layout, embeds)
        found = self._trunk.last_states_and_gradient(layout, x, self.attention_backend)
        if found is None:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                rewards = self._rewards(layout, x)
                total = rewards.sum()
            return rewards.detach().to(embeds.device), lambda: torch.autograd.grad(total, [x])[0].to(embeds)
        last, back = found
        head = self._network.score  # linear, as all are whose blocks our layers run
        logits = linear(last.to(self._reward_dtype), head.weight, head.bias)
        g = self.reading.gradient(logits, head.weight).to(last.dtype).contiguous()
        return self.reading.of(logits).to(embeds.device), lambda: back(g).to(embeds)

    def _rewards(self, layout: PackedLayout, x: Tensor) -> Tensor:
        last = self._trunk.last_states(layout, x, self.attention_backend)
        return self.reading.of(self._network.score(last.to(self._reward_dtype)))

    def sequence(self, conversation: Sequence[Message], response: str) -> list[int]:
        """Ids of the whole conversation, in the chat template, with `response` as its last turn."""
        return conversation_ids(self.tokenizer, conversation, response)

    def score(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Rewards (B,) of whole token sequences, each of one token at least; no gradient, order kept.

        Sequences of similar length are run together, at most `SCORE_TOKENS` tokens at a time. Padding at a sequence's
        end is cut: R is read before it. Of nothing but padding the first token is read, as transformers has it.
        InvalidRequest for one that is too long, which only models with learned positions have.
        """
        check_length(sequences, self._longest, self.name)
        if self.pad_token_id is not None:
            sequences = [ids[: max(1, self.content(ids))] for ids in sequences]
        rewards = torch.zeros(len(sequences), dtype=self._reward_dtype, device=self.device)
        with torch.no_grad():
            for pack in packs(sequences, SCORE_TOKENS):
                rewards[torch.tensor(pack, device=self.device)] = self._score([sequences[index] for index in pack])
        return rewards

    def _score(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Rewards (B,) of one pack. What all of its sequences begin with is run once."""
        shared = _common_prefix(sequences)
        prefix = self.prefill(sequences[0][:shared]) if shared >= MIN_SHARED_TOKENS else EMPTY_PREFIX
        own = [sequence[prefix.length :] for sequence in sequences]
        layout = self.layout((prefix,) * len(own), [len(ids) for ids in own])
        return self.read(layout, self.own_embeddings(torch.tensor([token for ids in own for token in ids])))

    def _here(self, layout: PackedLayout, embeds: Tensor) -> Tensor:
        """Embeddings of a layout's tokens on the model's device, in the dtype that it computes in."""
        if embeds.shape != (layout.tokens, self.hidden_size):
            raise ValueError(f"embeds {tuple(embeds.shape)} for {layout.tokens} tokens of {self.hidden_size}")
        return embeds.to(self.device, self.activation_dtype)


def _common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many first tokens all of several sequences share, leaving each at least one of its own; 0 for one alone."""
    if len(sequences) < 2:
        return 0
    shared = min(map(len, sequences)) - 1
    for sequence in sequences[1:]:
        shared = next((at for at in range(shared) if sequence[at] != sequences[0][at]), shared)
    return shared


def load_reward_model(
    found: Classifier,
    *,
    diffusion_tokenizer: Tokenizer,
    diffusion_vocab_size: int,
    dtype: torch.dtype,
    device: torch.device,
    vocab_fallback: VocabFallback = "unk",
    table_device: torch.device | None = None,
) -> RewardModel:
    """Load a causal classifier and map its vocabulary. An adapter may bring a tokenizer.

    `diffusion_vocab_size` is V, the width of the diffusion model's logits; `table_device` is where those are, when not
    on `device`. Raises ConfigurationError, whose message names the reward model and the key, file, token or setting
    that is wrong.
    """
    with blaming(found.name):
        if found.input is not None:
            raise ConfigurationError("an encoder has no gradient here")
        folder, adapter = found.folder, found.adapter
        brought = adapter is not None and (adapter / "tokenizer.json").is_file()
        tokenizer = Tokenizer.load(adapter if adapter and brought else folder, f"reward model {found.name}")
        if not tokenizer.has_chat_template:
            raise ConfigurationError("chat_template: there is none, in chat_template.jinja or tokenizer_config.json")
        if not any(split_at_response(tokenizer, (Message("user", "Hello"),))):
            raise ConfigurationError("chat_template: it writes the response alone, and an empty one could not be read")
        ids, coverage = map_vocabulary(found.name, diffusion_tokenizer, tokenizer, diffusion_vocab_size, vocab_fallback)
        network = load_causal(found, dtype=dtype, device=device)
        check_tokens(tokenizer.vocab(), network.get_input_embeddings().weight.shape[0])
    config = network.config.get_text_config()
    info = RewardModelInfo(
        id=found.name,
        family=config.model_type,
        context_length=config.max_position_embeddings,
        vocab_coverage=coverage,
        vocab_fallback=vocab_fallback,
        dtype=str(dtype).removeprefix("torch."),
        parameters=sum(weight.numel() for weight in network.parameters()),
        label=found.reading.label,
        output=found.reading.output,
    )
    return RewardModel(found.name, network, tokenizer, ids, info, table_device, found.reading)

"""Encoders: classifiers whose attention is not causal (BERT, RoBERTa, DeBERTa, ModernBERT, DistilBERT and others).

They run as transformers has them, on whole texts and without a gradient: for final rewards, for resampling and for
scores. A text stands between the special tokens that the tokenizer itself puts around it, and is data: a special
token's string in it is plain characters. Texts of similar length are padded to the longest and run together. None is
ever cut: one that is too long is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor
from transformers import AutoTokenizer

from server.errors import ConfigurationError
from server.models.acceleration import tried
from server.rewards.classifier import Classifier, blaming
from server.rewards.network import (
    check_complete,
    check_tokens,
    first_line,
    learned_positions,
    load_network,
    positions_of,
)
from server.rewards.text_reward import SCORE_TOKENS, check_length, packs
from server.text.template import query_text
from server.types import Message, RewardModelInfo

TOKENIZER_FILES = ("tokenizer.json",), ("vocab.txt",), ("vocab.json", "merges.txt")
"""What a tokenizer may be stored as."""

LONGEST = 10**9
"""A tokenizer that knows no limit says more tokens than these."""

ASKED = (Message("user", "Is it good?"),)
TRIALS = "Yes.", "It is what it is."
"""Texts of unlike length, which must be scored side by side as they are alone."""


class Encoder:
    """A loaded encoder."""

    def __init__(self, found: Classifier, network: Any, tokenizer: Any, info: RewardModelInfo) -> None:
        self.name, self.info = found.name, info
        self._network, self._labels, self._reading = network, found.labels, found.reading
        self._device = network.get_input_embeddings().weight.device
        pad = network.config.get_text_config().pad_token_id
        self._pad = pad if pad is not None else tokenizer.pad_token_id or 0
        self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True
        self._between = self._end_of_first() if "token_type_ids" in tokenizer.model_input_names else None

    def sequence(self, conversation: Sequence[Message], response: str) -> list[int]:
        """Ids of what it reads, special tokens included."""
        ids: list[int] = self._encoded(conversation, response).ids
        return ids

    def score(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Rewards (B,) of what `sequence` made, in order. Raises InvalidRequest for one that is too long."""
        check_length(sequences, self.info.context_length, self.name)
        return self._reading.of(self._logits(sequences))

    def try_padding(self) -> str:
        """Why texts cannot be scored side by side, "" where they can: an architecture may need inputs that no text has,
        or see the padding beside it."""
        sequences = [self.sequence(ASKED, text) for text in TRIALS]

        def worst_difference() -> float:
            alone = torch.cat([self._logits([ids]) for ids in sequences])
            return float((self._logits(sequences) - alone).norm() / alone.norm().clamp_min(1.0))

        return tried(worst_difference)

    def _encoded(self, conversation: Sequence[Message], response: str) -> tokenizers.Encoding:
        texts = (query_text(conversation), response) if self.info.input == "pair" else (response,)
        return self._tokenizer.encode(*texts)

    def _end_of_first(self) -> int | None:
        """The token that ends the first of two texts, after which tokens have the type 1; None where all have one type.
        Raises ConfigurationError where it cannot be told by that."""
        encoded = self._encoded(ASKED, TRIALS[0])
        if not any(encoded.type_ids):
            return None
        end: int = encoded.ids[encoded.type_ids.index(1) - 1]
        if encoded.type_ids != _types(encoded.ids, end):
            raise ConfigurationError("input: this tokenizer's pairs have other types of tokens than first and second")
        return end

    def _logits(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Logits (B, C)."""
        logits = torch.zeros(len(sequences), self._labels, dtype=self._network.dtype, device=self._device)
        for pack in packs(sequences, SCORE_TOKENS):
            logits[pack] = self._pass([sequences[index] for index in pack])
        return logits

    @torch.no_grad()
    def _pass(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Logits of sequences that are padded to the longest and run together."""
        width = max(map(len, sequences))

        def padded(rows: Sequence[Sequence[int]], filling: int) -> Tensor:
            return torch.tensor([[*row, *[filling] * (width - len(row))] for row in rows], device=self._device)

        inputs = {"attention_mask": padded([[1] * len(ids) for ids in sequences], 0)}
        if self._between is not None:
            inputs["token_type_ids"] = padded([_types(ids, self._between) for ids in sequences], 0)
        logits: Tensor = self._network(input_ids=padded(sequences, self._pad), **inputs).logits
        return logits


def _types(ids: Sequence[int], end: int) -> list[int]:
    """0 up to the first token `end`, and 1 after it."""
    first = ids.index(end) + 1
    return [0] * first + [1] * (len(ids) - first)


def load_encoder(found: Classifier, *, dtype: torch.dtype, device: torch.device) -> Encoder:
    """Load an encoder, in float32 at least: in 16 bits a score would depend on the padding beside it.

    Raises ConfigurationError, whose message names the reward model and the key or the file that is wrong.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    with blaming(found.name):
        tokenizer = _load_tokenizer(found.folder)
        network, missing = load_network(found, dtype=dtype, device=device)
        check_complete(found, missing)
        check_tokens(tokenizer.backend_tokenizer.get_vocab(), len(network.get_input_embeddings().weight))
        config = network.config.get_text_config()
        limits = learned_positions(network), positions_of(config), tokenizer.model_max_length
        longest = min(limit for limit in limits if limit is not None)
        if longest > LONGEST:
            raise ConfigurationError("model_max_length: neither the tokenizer nor config.json says how much it reads")
        info = RewardModelInfo(
            id=found.name,
            family=config.model_type,
            context_length=longest,
            vocab_coverage=None,
            vocab_fallback=None,
            dtype=str(dtype).removeprefix("torch."),
            parameters=sum(weight.numel() for weight in network.parameters()),
            gradient=False,
            label=found.reading.label,
            output=found.reading.output,
            input=found.input,
        )
        encoder = Encoder(found, network, tokenizer, info)
        if unfit := encoder.try_padding():
            name = type(network).__name__
            raise ConfigurationError(f"architectures: {name} does not score texts beside each other: {unfit}")
    return encoder


def _load_tokenizer(folder: Path) -> Any:
    """transformers' own. Without these files it would have no words, and say nothing."""
    if not any(all((folder / name).is_file() for name in names) for names in TOKENIZER_FILES):
        listed = ", ".join(" with ".join(names) for names in TOKENIZER_FILES)
        raise ConfigurationError(f"{folder.name}: there is no tokenizer, which is one of {listed}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise ConfigurationError(f"the tokenizer cannot be read: {first_line(error)}") from error
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ConfigurationError(f"tokenizer_class: {type(tokenizer).__name__} has no form of the tokenizers library")
    return tokenizer

"""What final rewards, resampling and `/v1/score` need of a reward: its value on texts, with a gradient or without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor

from server.errors import InvalidRequest
from server.types import Message, RewardModelInfo

SCORE_TOKENS = 8192
"""Tokens that `score` runs in one forward; a longer sequence goes alone."""


class TextReward(Protocol):
    """A loaded reward: a `RewardModel`, or an encoder."""

    @property
    def info(self) -> RewardModelInfo:
        """Its name, its context length and what else is known of it."""

    def sequence(self, conversation: Sequence[Message], response: str) -> list[int]:
        """Token ids of a whole conversation that ends with `response`, as `score` takes them."""

    def score(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Rewards (B,) of token sequences, in order; no gradient."""


def check_length(sequences: Sequence[Sequence[int]], limit: int | None, name: str) -> None:
    """Refuse a text of more tokens than a reward can read: InvalidRequest, which names the reward and the limit."""
    longest = max(map(len, sequences), default=0)
    if limit is not None and longest > limit:
        message = f"the response with what it answers takes {longest} tokens; reward model {name} reads {limit} at most"
        raise InvalidRequest(message, "max_tokens")


def packs(sequences: Sequence[Sequence[int]], most: int) -> Iterator[list[int]]:
    """The indices of sequences of similar length that go together: padded to the longest of them they take at most
    `most` tokens, but one always goes."""
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    pack: list[int] = []
    for index in order:
        if pack and (len(pack) + 1) * len(sequences[index]) > most:
            yield pack
            pack = []
        pack.append(index)
    if pack:
        yield pack

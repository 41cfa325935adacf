"""What a call of an outside scorer takes and how it can fail."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from server.types import Message

Pair: TypeAlias = tuple[tuple[Message, ...], str]
"""A conversation and a response to it."""
Metadata: TypeAlias = dict[str, Any] | None
"""What the request's `metadata` holds."""
Reason = Literal["connection", "timeout", "status", "refused", "answer", "raised", "died"]
"""Why a call failed, in one word: nobody is there, or says nothing in time; 429 or a 5xx; another status that is no
answer; an answer of another shape; the function raised; its process ended."""
DOWN = frozenset({"connection", "timeout", "status", "died"})
"""Reasons that speak of the scorer, and not of what it was asked."""
FINAL = frozenset({"refused", "raised"})
"""Reasons for which the same call would fail again."""


class CallFailed(Exception):
    """A call has no result. The message, which clients may see, ends a sentence that begins with the scorer's name."""

    def __init__(self, reason: Reason, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.retry_after = retry_after


def turns(conversation: Sequence[Message]) -> list[dict[str, str]]:
    """The conversation as JSON has it."""
    named = ({"name": turn.name} if turn.name is not None else {} for turn in conversation)
    return [{"role": turn.role, "content": turn.content} | name for turn, name in zip(conversation, named, strict=True)]


def finite(scores: Any, count: int) -> list[float]:
    """So many finite numbers. Raises CallFailed for anything else."""
    good = isinstance(scores, list) and all(type(each) in (int, float) and math.isfinite(each) for each in scores)
    if good and len(scores) == count:
        return [float(score) for score in scores]
    raise CallFailed("answer", f"did not answer with {count} finite numbers")

"""The text of a response: where it ends, and how it can be sent while it is still being filled in.

A response ends at its first *stop token* (the family's EOS and end-of-turn tokens) or in front of the first *stop
string* of the request, whichever comes first in the text. Special tokens are never part of the text.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from server.text.tokenizer import Tokenizer
from server.types import FinishReason

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what bytes that are not (yet) UTF-8 decode to


@dataclass(frozen=True, slots=True)
class FinishedText:
    """A response's text; why it ended; the stop string that cut it; how many tokens the text takes."""

    text: str
    finish_reason: FinishReason
    stop_reason: str | None
    completion_tokens: int


def finish_text(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    stop_token_ids: Collection[int],
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
) -> FinishedText:
    """The text of a response's canvas tokens (L,).

    `completion_tokens` counts the tokens up to the end of the text, the stop token not among them. With `ignore_eos`
    stop tokens end nothing and every token counts. A stop string cuts the text in either case; where two begin at the
    same place, the one named first counts.
    """
    length = len(token_ids) if ignore_eos else _first_stop_token(token_ids, stop_token_ids)
    ended = length < len(token_ids)
    text = tokenizer.decode(token_ids[:length])
    cut, stop_reason = _first_stop_string(text, stop)
    if stop_reason is not None:
        ended = True
        text = text[:cut]
        if not ignore_eos:
            length = _tokens_of(tokenizer, token_ids[:length], text)
    return FinishedText(text, "stop" if ended else "length", stop_reason, length)


class StreamDecoder:
    """Turns what is revealed anywhere on a canvas into text deltas whose concatenation is `finish_text(...).text`.

    Text is sent up to the first masked position. A delta never holds half a character, nor characters that may turn
    out to belong to a stop string. `tokens` counts the tokens that what has been sent takes.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_token_ids: Collection[int],
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.stop_token_ids = frozenset(stop_token_ids)
        self.stop = tuple(stop)
        self.ignore_eos = ignore_eos
        self.tokens = 0
        self._ids: list[int] = []  # from the left edge to the first masked position
        self._waiting: dict[int, int] = {}  # revealed beyond it
        self._sent = 0  # characters

    def reveal(self, revealed: Iterable[tuple[int, int]]) -> str:
        """Take (position, token id) pairs; returns the text that is now sure, often empty."""
        before = len(self._ids)
        self._waiting.update(revealed)
        while (token := self._waiting.pop(len(self._ids), None)) is not None:
            self._ids.append(token)
        if len(self._ids) == before:
            return ""
        length = len(self._ids) if self.ignore_eos else _first_stop_token(self._ids, self.stop_token_ids)
        text = self.tokenizer.decode(self._ids[:length])
        delta = self.rest(text[: self._sure(text)])
        if delta:
            self.tokens = len(self._ids)
        return delta

    def rest(self, text: str) -> str:
        """What of `text`, the final one in the end, has not been sent; now it has."""
        delta = text[self._sent :]
        self._sent += len(delta)
        return delta

    def _sure(self, text: str) -> int:
        """Length of the part of `text` that no further token can change or cut."""
        whole = text.rstrip(REPLACEMENT)  # what follows may be the first bytes of a character
        end = len(whole)
        for string in self.stop:
            found = text.find(string)
            if found >= 0:
                end = min(end, found)
            begun = next((n for n in range(len(string) - 1, 0, -1) if whole.endswith(string[:n])), 0)
            end = min(end, len(whole) - begun)
        return end


def _first_stop_token(token_ids: Sequence[int], stop_token_ids: Collection[int]) -> int:
    """Index of the first stop token, or the number of tokens."""
    return next((index for index, token in enumerate(token_ids) if token in stop_token_ids), len(token_ids))


def _first_stop_string(text: str, stop: Sequence[str]) -> tuple[int, str | None]:
    """(place, string) of the earliest stop string in `text`, or (its length, None)."""
    cut, reason = len(text), None
    for string in stop:
        found = text.find(string)
        if found >= 0 and (reason is None or found < cut):
            cut, reason = found, string
    return cut, reason


def _tokens_of(tokenizer: Tokenizer, token_ids: Sequence[int], text: str) -> int:
    """The smallest number of leading tokens whose text begins with `text`, by bisection."""
    low, high = 0, len(token_ids)
    while low < high:
        middle = (low + high) // 2
        if tokenizer.decode(token_ids[:middle]).startswith(text):
            high = middle
        else:
            low = middle + 1
    return low

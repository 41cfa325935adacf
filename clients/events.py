"""What a stream says, as typed events.

A stream is some `TextDelta` and `CanvasFrame`, one `ChoiceFinished` per choice, and a `Summary` at its end. An error
inside the stream is raised; so is an end without `[DONE]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .errors import StreamBroken, from_envelope
from .sse import DONE, EventParser
from .types import GuidanceReport, StepTrace, Usage, decode


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text to append to choice `index`."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class ChoiceFinished:
    """Choice `index` has all its text."""

    index: int
    finish_reason: str
    stop_reason: int | str | None = None
    reward: float | None = None
    rewards: dict[str, float | None] | None = None
    token_ids: list[int] | None = None


@dataclass(frozen=True, slots=True)
class CanvasFrame:
    """A trajectory's canvas after `step`: text of each token, None where it is still masked; entropy in nats; the
    trajectory whose copy took its place last."""

    prompt: int
    trajectory: int
    step: int
    tokens: list[str | None]
    entropy: list[float | None] | None = None
    reward: float | None = None
    ancestor: int | None = None


@dataclass(frozen=True, slots=True)
class Summary:
    """The end of a stream: what its chunks said of usage (with `include_usage`), guidance and trace."""

    usage: Usage | None = None
    guidance: GuidanceReport | None = None
    trace: list[list[list[StepTrace]]] | None = None


Event = TextDelta | ChoiceFinished | CanvasFrame | Summary


@dataclass(frozen=True, slots=True)
class _Delta:
    content: str | None = None


@dataclass(frozen=True, slots=True)
class _ChunkChoice:
    index: int
    text: str | None = None
    delta: _Delta = _Delta()
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    reward: float | None = None
    rewards: dict[str, float | None] | None = None
    token_ids: list[int] | None = None


@dataclass(frozen=True, slots=True)
class _Chunk:
    choices: list[_ChunkChoice] = field(default_factory=list)
    usage: Usage | None = None
    guidance: GuidanceReport | None = None
    trace: list[list[list[StepTrace]]] | None = None
    canvas: CanvasFrame | None = None
    error: Any = None


class StreamReader:
    """Bytes of an event stream in, events out. Knows nothing of sockets."""

    def __init__(self, request_id: str | None = None) -> None:
        self.done = False
        self._request_id = request_id
        self._parser = EventParser()
        self._usage: Usage | None = None
        self._guidance: GuidanceReport | None = None
        self._trace: list[list[list[StepTrace]]] | None = None

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """The events that `chunk` completes. Raises ApiError for an error event, UnexpectedResponse for bad JSON."""
        for data in self._parser.feed(chunk):
            if self.done:
                return
            if data == DONE:
                self.done = True
                yield Summary(self._usage, self._guidance, self._trace)
            else:
                yield from self._events(decode(data, _Chunk))

    def close(self) -> None:
        """Called at the end of the bytes; raises StreamBroken if `[DONE]` has not come."""
        if not self.done:
            raise StreamBroken("the stream ended before [DONE]")

    def _events(self, chunk: _Chunk) -> Iterator[Event]:
        if chunk.error is not None:
            raise from_envelope(chunk.error, request_id=self._request_id)
        self._usage = chunk.usage or self._usage
        self._guidance = chunk.guidance or self._guidance
        self._trace = chunk.trace or self._trace
        if chunk.canvas is not None:
            yield chunk.canvas
        for choice in chunk.choices:
            text = choice.delta.content if choice.text is None else choice.text
            if text:
                yield TextDelta(choice.index, text)
            if choice.finish_reason is not None:
                yield ChoiceFinished(
                    choice.index,
                    choice.finish_reason,
                    choice.stop_reason,
                    choice.reward,
                    choice.rewards,
                    choice.token_ids,
                )

"""The chunks of a stream as the OpenAPI document shows them; `stream` writes them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from server.api.answers import Answer, Choice, CompletionChoice, GuidanceReport, Head, Usage


class Delta(Answer):
    """What to append to a turn."""

    role: Literal["assistant"] = "assistant"
    content: str = ""


class ChatChunkChoice(Choice):
    """Part of a turn."""

    delta: Delta


class CanvasReport(Answer):
    """One trajectory after a denoising step: token texts (null where masked) and entropies in nats."""

    prompt: int
    trajectory: int
    step: int
    tokens: list[str | None]
    entropy: list[float | None] | None
    reward: float | None


class Chunk(Head):
    """What both kinds of chunk share."""

    usage: Usage | None = None
    guidance: GuidanceReport | None = None
    canvas: CanvasReport | None = None


class CompletionChunk(Chunk):
    """A chunk of `POST /v1/completions`."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class ChatCompletionChunk(Chunk):
    """A chunk of `POST /v1/chat/completions`."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]


def event_schema(chunk: type[BaseModel], error: type[BaseModel], reference: str) -> dict[str, Any]:
    """Schema of one server-sent event whose data is a chunk, an error, or the last word. `reference` is a template."""
    contents = [{"$ref": reference.format(model=model.__name__)} for model in (chunk, error)]
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": contents}}
    return {
        "type": "object",
        "required": ["data"],
        "properties": {"data": {"anyOf": [{"const": "[DONE]"}, data]}},
    }

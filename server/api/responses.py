"""`POST /v1/responses`, text only: its own fields, and the shape of its answers and of its events. What is computed and
streamed is what a chat completion is.

An answer is one turn with one text. Our fields stand beside `output` and not in its items, which clients send back as
turns of the next request's `input`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from server.api.answers import Answer, CanvasReport, Data, GuidanceReport, Outcome, choice, chosen, report, usage
from server.api.convert import Plan
from server.api.errors import ErrorBody, envelope
from server.api.fields import STREAM, ConversationRequest, No, ResponseFormat, StreamOptions
from server.api.rules import Strict, Within
from server.api.stream import Chunks
from server.api.values import ChatMessage, Count, Input, NoList, Text
from server.errors import RequestError
from server.text.tokenizer import Tokenizer
from server.types import JobResult, StepTrace

Status = Literal["in_progress", "completed", "incomplete"]


class TextOptions(Strict):
    """Only text."""

    format: ResponseFormat | None = None
    """Only plain text"""
    verbosity: None = None


class EventOptions(StreamOptions):
    """Options of a stream of a response's events, of which the last has the usage."""

    continuous_usage_stats: No = False
    """Events have no room for it"""


class ResponsesRequest(ConversationRequest):
    """`POST /v1/responses`: one text, kept nowhere."""

    source: ClassVar = "input"
    prefix: ClassVar = "resp_"
    canvas: ClassVar = "max_output_tokens"

    input: Input
    """A text, or the turns of a conversation"""
    instructions: Text | None = None
    """A turn of the system before `input`"""
    max_output_tokens: Annotated[Count, Within("canvas")] | None = None
    """The name of `max_tokens` here; both must agree"""
    n: Annotated[int, Field(ge=1, le=1)] = 1
    """One text is answered"""
    stream_options: Annotated[EventOptions | None, STREAM] = None
    """What else the events tell"""
    store: No = False
    """Only false: nothing is kept of a request"""
    background: No = False
    text: TextOptions | None = None
    """Which text is wanted: only plain text"""
    truncation: Literal["disabled"] | None = None
    include: NoList | None = None
    previous_response_id: None = None
    conversation: None = None
    reasoning: None = None
    max_tool_calls: None = None

    @property
    def turns(self) -> Sequence[ChatMessage]:
        if self.instructions is None:
            return self.input
        return [ChatMessage(role="system", content=self.instructions), *self.input]


class OutputText(Answer):
    """The answer's text."""

    type: Literal["output_text"]
    text: str
    annotations: list[str] = Field(max_length=0)
    logprobs: list[float] = Field(max_length=0)


class OutputMessage(Answer):
    """The answer as a turn."""

    id: str
    type: Literal["message"]
    status: Status
    role: Literal["assistant"]
    content: list[OutputText]


class ReadAndWritten(Answer):
    """The counts of `answers.Usage` under the names that they have here."""

    input_tokens: int
    input_tokens_details: dict[Literal["cached_tokens", "cache_write_tokens"], int]
    output_tokens: int
    output_tokens_details: dict[Literal["reasoning_tokens", "trajectory_tokens"], int]
    total_tokens: int


class Whole(Outcome):
    """Answer to `POST /v1/responses`: `incomplete` where the text had no end within its tokens or its time."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Status
    error: None
    incomplete_details: dict[Literal["reason"], Literal["max_output_tokens"]] | None
    instructions: str | None
    max_output_tokens: int
    metadata: dict[str, Any]
    model: str
    output: list[OutputMessage]
    usage: ReadAndWritten | None
    temperature: float
    top_p: float
    user: str | None
    text: dict[Literal["format"], dict[Literal["type"], Literal["text"]]]
    store: Literal[False]
    background: Literal[False]
    previous_response_id: None
    parallel_tool_calls: bool
    tool_choice: Literal["none", "auto"]
    tools: list[str] = Field(max_length=0)
    truncation: Literal["disabled"]
    guidance: GuidanceReport | None = None
    trace: list[list[list[StepTrace]]] = Field([])


class AnyEvent(Answer):
    """One event of a stream; which fields it has beside its number is said by `type`, as in OpenAI's. `response.canvas`
    is ours, and comes with `stream_canvas`."""

    type: Literal[
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        "response.output_text.delta", "response.output_text.done", "response.content_part.done",
        "response.output_item.done", "response.completed", "response.incomplete", "response.canvas", "error",
    ]  # fmt: skip
    """Which event it is"""
    sequence_number: int
    response: Whole | None = None
    item: OutputMessage | None = None
    part: OutputText | None = None
    item_id: str = ""
    output_index: int = 0
    content_index: int = 0
    delta: str = ""
    """What to append to the text"""
    text: str = ""
    logprobs: list[float] = Field([], max_length=0)
    canvas: CanvasReport | None = None
    """A trajectory after a step"""
    error: ErrorBody | None = None
    message: str = ""
    """As in `error`"""
    code: str | None = None
    """As in `error`"""
    param: str | None = None
    """As in `error`"""


def _text(text: str) -> Data:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _message(plan: Plan, status: Status, *content: Data) -> Data:
    identity = plan.id.removeprefix(ResponsesRequest.prefix)
    return {"id": f"msg_{identity}", "type": "message", "status": status, "role": "assistant", "content": [*content]}


def _response(plan: Plan, status: Status, *output: Data) -> Data:
    """What a response says before anything is known of its answer, with what is."""
    asked = plan.asked
    assert isinstance(asked, ResponsesRequest)
    return {
        "id": plan.id,
        "object": "response",
        "created_at": plan.created,
        "status": status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": asked.instructions,
        "max_output_tokens": plan.sampling.max_tokens,
        "metadata": asked.metadata or {},
        "model": plan.model,
        "output": [*output],
        "usage": None,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "user": asked.user,
        "text": {"format": {"type": "text"}},
        "store": False,
        "background": False,
        "previous_response_id": None,
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "tool_choice": asked.tool_choice or "auto",
        "tools": [],
        "truncation": "disabled",
    }


def response(plan: Plan, results: Sequence[JobResult]) -> Data:
    """The whole answer."""
    (answer,) = chosen(results[0])
    status: Status = "completed" if answer.finish_reason == "stop" else "incomplete"
    counts = usage(plan, results)
    told = {
        "input_tokens": counts["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": counts["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0, **counts["completion_tokens_details"]},
        "total_tokens": counts["total_tokens"],
    }
    ours = choice(plan, 0, answer)
    for name in ("index", "finish_reason", "logprobs"):
        del ours[name]
    made = _response(plan, status, _message(plan, status, _text(answer.text)))
    return made | {"usage": told} | ours | report(plan, results)


def failure(error: RequestError) -> Data:
    """What the event of a failure tells, in the form of both of OpenAI's clients and of its document."""
    told = envelope(error)["error"]
    return {**told, "error": told}


class Events(Chunks):
    """Turns events into OpenAI's events of a response, which have names and numbers. The last one ends the stream."""

    last = b""

    def __init__(self, plan: Plan, tokenizer: Tokenizer, stop_token_ids: tuple[int, ...]) -> None:
        super().__init__(plan, tokenizer, stop_token_ids)
        self._numbers = itertools.count()
        self._item = {"item_id": _message(plan, "in_progress")["id"], "output_index": 0}
        self._part = {**self._item, "content_index": 0}

    def begin(self) -> Iterator[Data]:
        """The events before the text."""
        empty = _response(self._plan, "in_progress")
        yield self._event("response.created", response=empty)
        yield self._event("response.in_progress", response=empty)
        item = _message(self._plan, "in_progress")
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._event("response.content_part.added", **self._part, part=_text(""))

    def failed(self, error: RequestError) -> Data:
        """The event that tells of a failure."""
        return self._event("error", **failure(error))

    def _finished(self, prompt: int, result: JobResult) -> Iterator[Data]:
        whole = response(self._plan, [result])
        (item,) = whole["output"]
        (part,) = item["content"]
        if rest := self._texts[0].rest(part["text"]):
            yield self._text_chunk(0, rest)
        yield self._event("response.output_text.done", **self._part, text=part["text"], logprobs=[])
        yield self._event("response.content_part.done", **self._part, part=part)
        yield self._event("response.output_item.done", output_index=0, item=item)
        yield self._event(f"response.{whole['status']}", response=whole)

    def _text_chunk(self, index: int, text: str) -> Data:
        return self._event("response.output_text.delta", **self._part, delta=text, logprobs=[])

    def _chunk(self, *choices: Data) -> Data:
        """Only canvases have no event of OpenAI's."""
        return self._event("response.canvas")

    def _event(self, name: str, **fields: Any) -> Data:
        return {**fields, "type": name, "sequence_number": next(self._numbers)}

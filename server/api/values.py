"""The types of request fields that pydantic's own cannot say in one line: forms that mean the same, texts, names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, ValidationInfo

from server.api.rules import (
    Listed,
    Strict,
    Within,
    invalid,
    no_gradient,
    no_such_model,
    no_such_reward_model,
    not_loaded,
)
from server.errors import quote
from server.methods import METHODS
from server.text.template import GIVEN

MAX_COUNT = 2**20  # no canvas is longer, whatever the model's context
MAX_PROMPTS = 1024  # of any server
MAX_PAIRS = 65_536
STOP_CHARACTERS = 1000
TEMPLATE_CHARACTERS = 8192
LEAST_TEMPERATURE = 1e-6  # below, logits / temperature leave float32's range

Count: TypeAlias = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Share: TypeAlias = Annotated[float, Field(ge=0, le=1)]
Name: TypeAlias = Annotated[str, Field(min_length=1, max_length=500)]
ModelName: TypeAlias = Annotated[Name, Listed("models", no_such_model)]
ScoringModel: TypeAlias = Annotated[Name, Listed("reward_models", no_such_reward_model)]
GuidingModel: TypeAlias = Annotated[Name, Listed("reward_models", not_loaded)]


def _nearly_zero(temperature: float) -> float:
    """Clients that cannot send 0 send the smallest number that they have."""
    return 0.0 if temperature < LEAST_TEMPERATURE else temperature


Temperature: TypeAlias = Annotated[float, Field(ge=0, le=2), AfterValidator(_nearly_zero)]
RankingTemperature: TypeAlias = Annotated[float, Field(ge=0, le=1000), AfterValidator(_nearly_zero)]


def _known_method(name: str) -> str:
    if name not in METHODS:
        *first, last = (f"'{known}'" for known in METHODS)
        raise invalid(f"must be {', '.join(first)} or {last} (got {quote(name)})")
    return name


MethodName: TypeAlias = Annotated[str, AfterValidator(_known_method), Listed("methods", no_gradient)]

Prompt: TypeAlias = str | list[int]


def _is_token(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _check_text(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise invalid("holds a lone surrogate, which is not text") from None
    return text


def _prompts(value: object, info: ValidationInfo) -> list[Prompt]:
    """The four prompt forms as one: a list of texts or of token id lists."""
    if isinstance(value, str) or (isinstance(value, list) and value and all(map(_is_token, value))):
        value = [value]
    if not isinstance(value, list):
        raise invalid("must be a string, a list of strings, a list of token ids or a list of such lists")
    if not value:
        raise invalid("must not be empty")
    if len(value) > MAX_PROMPTS:
        raise invalid(f"must not hold more than {MAX_PROMPTS} prompts")
    if {*map(type, value)} not in ({str}, {list}):
        raise invalid("must hold only strings, only token ids (integers from 0) or only lists of token ids")
    Within("trajectories").check(value, info)
    for prompt in value:
        if isinstance(prompt, str):
            _check_text(prompt)
            continue
        for token in prompt:
            if not _is_token(token):
                raise invalid(f"{quote(token)} is not a token id")
        if info.context is not None and (largest := max(prompt, default=0)) > info.context.vocabulary:
            raise invalid(f"holds token id {largest}; the last of the vocabulary is {info.context.vocabulary}")
    return value


TokenId: TypeAlias = Annotated[int, Field(ge=0, lt=2**31), Within("vocabulary")]
_PromptText: TypeAlias = Annotated[str, Field(min_length=1)]
_PromptTokens: TypeAlias = Annotated[list[TokenId], Field(min_length=1)]
_PromptForms: TypeAlias = (
    _PromptText
    | Annotated[list[_PromptText], Field(min_length=1, max_length=MAX_PROMPTS), Within("trajectories")]
    | _PromptTokens
    | Annotated[list[_PromptTokens], Field(min_length=1, max_length=MAX_PROMPTS), Within("trajectories")]
)
Prompts: TypeAlias = Annotated[list[Prompt], PlainValidator(_prompts, json_schema_input_type=_PromptForms)]


def _seeds(value: object) -> object:
    seeds = value if isinstance(value, list) else [value]
    if not all(type(seed) is int and -(2**63) <= seed < 2**63 for seed in seeds):
        raise invalid("must be an integer of 64 bits, or a list of such integers, one a prompt")
    return value


_Seed: TypeAlias = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Seeds: TypeAlias = Annotated[
    int | list[int],
    PlainValidator(_seeds, json_schema_input_type=_Seed | Annotated[list[_Seed], Field(max_length=MAX_PROMPTS)]),
]


def _texts(value: object) -> object:
    """One text is a list of one."""
    if not isinstance(value, str | list):
        raise invalid("must be a string or a list of strings")
    return [value] if isinstance(value, str) else value


Text: TypeAlias = Annotated[str, AfterValidator(_check_text)]
StopString: TypeAlias = Annotated[str, Field(min_length=1, max_length=STOP_CHARACTERS), AfterValidator(_check_text)]
StopList: TypeAlias = Annotated[list[StopString], Field(max_length=4)]
Stops: TypeAlias = Annotated[StopList, BeforeValidator(_texts, json_schema_input_type=StopString | StopList)]


class TextPart(Strict):
    """One text part of a message's content."""

    type: Literal["text"]
    """Only text is understood"""
    text: str
    """The text"""


def _content(value: object, kinds: Sequence[str] = ("text",), idle: Sequence[str] = ()) -> object:
    """Text parts joined by line breaks, as vLLM joins them; anything but text is refused. A part is of one of these
    `kinds`; what is `idle` may stand in it as null or an empty list."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise invalid("must be a string or a list of text parts")
    texts = []
    for index, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") not in kinds or not isinstance(part.get("text"), str):
            kind = f'{{"type": "{kinds[0]}", "text": string}}'
            raise invalid(f"must be a string or a list of {kind}; only text is understood")
        if unknown := sorted(set(part) - {"type", "text"} - {name for name in idle if part.get(name) in (None, [])}):
            raise invalid(f"holds {quote(unknown[0])} in part {index}; a text part has `type` and `text` only")
        texts.append(part["text"])
    if not texts:
        raise invalid("must not be an empty list")
    return "\n".join(texts)


_Parts: TypeAlias = Annotated[list[TextPart], Field(min_length=1)]
Content: TypeAlias = Annotated[Text, BeforeValidator(_content, json_schema_input_type=str | _Parts)]
NoList: TypeAlias = Annotated[list[Any], Field(max_length=0)]


def _arguments(value: object) -> object:
    """JSON scalars by name, none of which the server gives to the template itself."""
    if not isinstance(value, dict):
        raise invalid("must be an object")
    for name, each in value.items():
        if name in GIVEN:
            raise invalid(f"must not hold {quote(name)}, which the server gives to the template")
        if each is not None and not isinstance(each, bool | int | float | str):
            raise invalid(f"must hold strings, numbers, booleans and nulls only; {quote(name)} is none of them")
    if len(_check_text(json.dumps(value, ensure_ascii=False))) > TEMPLATE_CHARACTERS:
        raise invalid(f"must take at most {TEMPLATE_CHARACTERS} characters of JSON")
    return value


TemplateArguments: TypeAlias = Annotated[
    dict[str, Any],
    PlainValidator(_arguments, json_schema_input_type=dict[str, bool | int | float | str | None]),
]


class ChatMessage(Strict):
    """One turn. `developer` is OpenAI's newer word for `system`."""

    role: Literal["system", "user", "assistant", "developer"]
    """Whose turn it is"""
    content: Content
    """What was said: a text, or text parts, which are joined by line breaks"""
    name: Annotated[Text, Field(max_length=256)] | None = None
    """Who said it, for chat templates that write names; others ignore it"""
    refusal: None = None
    """As in answers, null"""
    audio: None = None
    annotations: NoList | None = None
    """As in answers, empty"""
    function_call: None = None
    tool_calls: NoList | None = None
    """As in answers, empty"""


Conversation: TypeAlias = Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]


class InputPart(Strict):
    """One text part of a turn of `input`."""

    type: Literal["input_text", "output_text"]
    """The first in a user's turn, the second in an answer's"""
    text: str
    """The text"""
    annotations: NoList | None = None
    """As in answers, empty"""
    logprobs: NoList | None = None
    """As in answers, empty"""


_input_content = partial(_content, kinds=("input_text", "output_text"), idle=("annotations", "logprobs"))
_InputParts: TypeAlias = Annotated[list[InputPart], Field(min_length=1)]


class InputMessage(ChatMessage):
    """One turn of `input`, which may be one of an earlier answer's `output`."""

    type: Literal["message"] = "message"
    """Only messages are understood"""
    content: Annotated[Text, BeforeValidator(_input_content, json_schema_input_type=str | _InputParts)]
    """What was said: a text, or text parts, which are joined by line breaks"""
    id: str | None = None
    """As in an answer's `output`"""
    status: str | None = None
    """As in an answer's `output`"""


def _turn(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _query(value: object) -> object:
    if not isinstance(value, str | list):
        raise invalid("must be a prompt or a list of messages")
    return _turn(value) if isinstance(value, str) else value


Query: TypeAlias = Annotated[Conversation, BeforeValidator(_query, json_schema_input_type=str | Conversation)]


def _input(value: object) -> object:
    for item in value if isinstance(value, list) else ():
        if isinstance(item, dict) and (kind := item.get("type") or "message") != "message":
            raise invalid(f"holds {quote(kind)}; only messages are understood, each with its text")
    return _query(value)


_Turns: TypeAlias = Annotated[list[InputMessage], Field(min_length=1, max_length=4096)]
Input: TypeAlias = Annotated[_Turns, BeforeValidator(_input, json_schema_input_type=str | _Turns)]


def _queries(value: object) -> object:
    """One text or one conversation is a list of one."""
    if isinstance(value, str):
        return [_turn(value)]
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return [value]
    if isinstance(value, list):
        return [_turn(item) if isinstance(item, str) else item for item in value]
    raise invalid("must be a prompt, a list of messages, or a list of those")


_QueryList: TypeAlias = Annotated[list[str | Conversation], Field(min_length=1, max_length=MAX_PAIRS), Within("pairs")]
Queries: TypeAlias = Annotated[
    list[Conversation],
    BeforeValidator(_queries, json_schema_input_type=str | Conversation | _QueryList),
    Field(min_length=1, max_length=MAX_PAIRS),
]

_ResponseList: TypeAlias = Annotated[list[Content], Field(min_length=1, max_length=MAX_PAIRS), Within("pairs")]
Responses: TypeAlias = Annotated[_ResponseList, BeforeValidator(_texts, json_schema_input_type=str | _ResponseList)]


class TextDocument(Strict):
    """A document as an object, as Cohere's and vLLM's clients may send it."""

    text: Text
    """The document"""


def _document(value: object) -> object:
    if not isinstance(value, dict):
        return value
    if unknown := sorted(set(value) - {"text"}):
        raise invalid(f"holds {quote(unknown[0])}, which would not be read: a document is a string or its `text` alone")
    return value.get("text")


Document: TypeAlias = Annotated[Content, BeforeValidator(_document, json_schema_input_type=str | TextDocument | _Parts)]
Documents: TypeAlias = Annotated[list[Document], Field(min_length=1, max_length=MAX_PAIRS), Within("pairs")]

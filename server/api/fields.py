"""Field types of the request schemas: what pydantic's own types cannot say in one line.

All fields are strict (no "5" for 5, no true for 1) and nullable: an explicit null means what leaving it out means.
Fields of OpenAI's that a masked diffusion model cannot honour are declared with the values that ask for nothing, so
that clients which always send them work and any real value is refused by name (`UNSUPPORTED`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator
from pydantic_core import PydanticCustomError

from server.errors import quote

INT64 = 2**63
MAX_COUNT = 2**20  # no canvas is longer; the model's own context is checked later
MAX_PROMPTS = 1024  # of any server; its own limit is checked later
STOP_CHARACTERS = 1000

Prompt: TypeAlias = str | list[int]


class Strict(BaseModel):
    """Base of all request objects: no coercion, no unknown fields, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True, protected_namespaces=())

    def given(self) -> set[str]:
        """Names of the fields that were sent with a value other than null."""
        return {name for name in self.model_fields_set if getattr(self, name) is not None}


def invalid(message: str) -> PydanticCustomError:
    """An error whose text pydantic takes as it stands."""
    return PydanticCustomError("invalid", "{message}", {"message": message})


def _is_token(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _check_text(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise invalid("holds a lone surrogate, which is not text") from None
    return text


def _prompts(value: object) -> list[Prompt]:
    """The four prompt forms as one: a list of texts and of token id lists."""
    if isinstance(value, str):
        return [_check_text(value)]
    if not isinstance(value, list):
        raise invalid("must be a string, a list of strings, a list of token ids or a list of such lists")
    if not value:
        raise invalid("must not be empty")
    if len(value) > MAX_PROMPTS and not _is_token(value[0]):
        raise invalid(f"must not hold more than {MAX_PROMPTS} prompts")
    if all(_is_token(item) for item in value):
        return [value]
    if all(isinstance(item, str) for item in value):
        return [_check_text(item) for item in value]
    if all(isinstance(item, list) for item in value):
        for item in value:
            for token in item:
                if not _is_token(token):
                    raise invalid(f"{quote(token)} is not a token id")
        return list(value)
    raise invalid("must hold only strings, only token ids (integers from 0) or only lists of token ids")


TokenId: TypeAlias = Annotated[int, Field(ge=0, lt=2**31)]
_PromptText: TypeAlias = Annotated[str, Field(min_length=1)]
_PromptTokens: TypeAlias = Annotated[list[TokenId], Field(min_length=1)]
_PromptForms: TypeAlias = (
    _PromptText
    | Annotated[list[_PromptText], Field(min_length=1, max_length=MAX_PROMPTS)]
    | _PromptTokens
    | Annotated[list[_PromptTokens], Field(min_length=1, max_length=MAX_PROMPTS)]
)
Prompts: TypeAlias = Annotated[list[Prompt], PlainValidator(_prompts, json_schema_input_type=_PromptForms)]


def _stops(value: object) -> object:
    if not isinstance(value, str | list):
        raise invalid("must be a string or a list of strings")
    return [value] if isinstance(value, str) else value


Text: TypeAlias = Annotated[str, AfterValidator(_check_text)]
StopString: TypeAlias = Annotated[str, Field(min_length=1, max_length=STOP_CHARACTERS), AfterValidator(_check_text)]
StopList: TypeAlias = Annotated[list[StopString], Field(max_length=4)]
Stops: TypeAlias = Annotated[StopList, BeforeValidator(_stops, json_schema_input_type=StopString | StopList)]


class TextPart(Strict):
    """One text part of a message's content."""

    type: Literal["text"]
    text: str


def _content(value: object) -> object:
    """Text parts joined by line breaks, as vLLM joins them; anything but text is refused."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise invalid("must be a string or a list of text parts")
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise invalid('must be a string or a list of {"type": "text", "text": string}; only text is understood')
        if unknown := set(part) - {"type", "text"}:
            raise invalid(f"a text part has no field {quote(min(unknown))}")
        texts.append(part["text"])
    if not texts:
        raise invalid("must not be an empty list")
    return "\n".join(texts)


_Parts: TypeAlias = Annotated[list[TextPart], Field(min_length=1)]
Content: TypeAlias = Annotated[Text, BeforeValidator(_content, json_schema_input_type=str | _Parts)]


def _boolean(value: object) -> object:
    """`Literal` compares, and 0 equals False."""
    if type(value) is not bool:
        raise invalid("must be a boolean")
    return value


# Values that ask for nothing.
No: TypeAlias = Annotated[Literal[False], BeforeValidator(_boolean)]
Yes: TypeAlias = Annotated[Literal[True], BeforeValidator(_boolean)]
Zero: TypeAlias = Annotated[float, Field(ge=0, le=0)]
One: TypeAlias = Annotated[float, Field(ge=1, le=1)]
ZeroInt: TypeAlias = Annotated[int, Field(ge=0, le=0)]
NoList: TypeAlias = Annotated[list[Any], Field(max_length=0)]
NoDict: TypeAlias = Annotated[dict[str, Any], Field(max_length=0)]


class ChatMessage(Strict):
    """One turn. `developer` is OpenAI's newer word for `system`."""

    role: Literal["system", "user", "assistant", "developer"]
    content: Content
    name: None = None
    refusal: None = None
    audio: None = None
    annotations: NoList | None = None
    function_call: None = None
    tool_calls: NoList | None = None


_NO_LIKELIHOOD = "a masked diffusion model has no left-to-right token probabilities"
_NO_TOOLS = "the model calls nothing, it only writes text"
_SAMPLER = "the sampler has no such filter"
UNSUPPORTED = {
    "echo": f"{_NO_LIKELIHOOD} to give with the prompt",
    "logprobs": _NO_LIKELIHOOD,
    "top_logprobs": _NO_LIKELIHOOD,
    "prompt_logprobs": _NO_LIKELIHOOD,
    "frequency_penalty": "tokens are not revealed from left to right, so there is no count to penalise",
    "presence_penalty": "tokens are not revealed from left to right, so there is no count to penalise",
    "repetition_penalty": "tokens are not revealed from left to right, so there is no count to penalise",
    "logit_bias": _SAMPLER,
    "min_p": _SAMPLER,
    "min_tokens": "the canvas has max_tokens positions; use ignore_eos to have them all",
    "add_special_tokens": "a prompt is tokenised as it stands, and a conversation by its chat template",
    "skip_special_tokens": "texts never hold special tokens; use return_token_ids to see them",
    "tools": _NO_TOOLS,
    "tool_choice": _NO_TOOLS,
    "functions": _NO_TOOLS,
    "function_call": _NO_TOOLS,
    "response_format": "only text is generated",
    "modalities": "only text is generated",
    "audio": "only text is generated",
    "prediction": "predicted outputs are not supported",
    "reasoning_effort": "reasoning is not supported",
    "verbosity": "verbosity is not supported",
    "web_search_options": "a request never makes the server fetch anything",
    "service_tier": "there is only one tier",
    "name": "participants' names are not shown to the model",
}
"""Why a real value of a field is refused, by the last part of its path."""

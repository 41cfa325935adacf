"""Request bodies, field by field. What depends on the loaded models or on other fields is checked in `convert`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler, WithJsonSchema
from pydantic_core import CoreSchema

from server.api.fields import (
    INT64,
    MAX_COUNT,
    ChatMessage,
    Content,
    No,
    NoDict,
    NoList,
    One,
    Prompts,
    Stops,
    Strict,
    Text,
    TokenId,
    Yes,
    Zero,
    ZeroInt,
    invalid,
)
from server.api.rules import DIFFUSION, PROMPT_OR_MESSAGES, STREAM, guidance, zero_or_more_than
from server.errors import quote
from server.methods import METHODS
from server.types import Algorithm, Confidence, Schedule

Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Name = Annotated[str, Field(min_length=1, max_length=500)]
LEAST_TEMPERATURE = 1e-6  # below, logits / temperature leave float32's range
Temperature = Annotated[float, Field(ge=0, le=2), WithJsonSchema(zero_or_more_than(LEAST_TEMPERATURE, 2))]
AlgorithmTemperature = Annotated[
    float, Field(ge=0, le=1000), WithJsonSchema(zero_or_more_than(LEAST_TEMPERATURE, 1000))
]


def _known_method(name: str) -> str:
    if name not in METHODS:
        names = [f"'{known}'" for known in METHODS]
        raise invalid(f"must be {', '.join(names[:-1])} or {names[-1]} (got {quote(name)})")
    return name


class _MethodNames:
    """The table as it is when the schema is made: plugins may have added to it."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return handler(schema) | {"enum": [*METHODS]}


Method = Annotated[str, AfterValidator(_known_method), _MethodNames()]


class RewardTerm(Strict):
    """One reward model of a weighted sum."""

    model: Name
    weight: Annotated[float, Field(ge=-1000, le=1000)] | None = None


class Guidance(Strict):
    """How the logits are steered by a reward model. `start` is less than `stop`; `reward_models` differ."""

    model_config = ConfigDict(json_schema_extra=guidance)

    method: Method | None = None
    reward_model: Name | None = None
    reward_models: Annotated[list[RewardTerm], Field(min_length=1, max_length=16)] | None = None
    gradient_steps: Annotated[int, Field(ge=0, le=16)] | None = None
    eta: Annotated[float, Field(ge=0, le=10)] | None = None
    confidence: Confidence | None = None
    start: Annotated[float, Field(ge=0, le=1)] | None = None
    stop: Annotated[float, Field(ge=0, le=1)] | None = None
    every: Count | None = None


def _guidance(value: object) -> object:
    """`"entrgi"` is short for `{"method": "entrgi"}`."""
    if not isinstance(value, str | dict):
        raise invalid("must be a method's name or an object")
    return {"method": value} if isinstance(value, str) else value


class Diffusion(Strict):
    """How the canvas is filled. `block_length` is at most `max_tokens`."""

    model_config = ConfigDict(json_schema_extra=DIFFUSION)

    steps: Count | None = None
    algorithm: Algorithm | None = None
    algorithm_temperature: AlgorithmTemperature | None = None
    entropy_bound: Annotated[float, Field(ge=0, le=1000)] | None = None
    confidence_threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    deprioritize_eos: bool | None = None
    block_length: Count | None = None
    schedule: Schedule | None = None
    cfg_scale: Annotated[float, Field(ge=0, le=100)] | None = None


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: No | None = None


class GenerationRequest(Strict):
    """What completions and chat completions share."""

    model_config = ConfigDict(json_schema_extra=STREAM)

    model: Name | None = None
    max_tokens: Count | None = Field(None, description="With the prompt and the suffix within the model's context")
    temperature: Temperature | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = Field(None, description="0, -1 or null: keep all")
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    n: Annotated[int, Field(ge=1, le=1024)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None,
        description="At least `n`, and equal to it with method `none`; with all prompts within the server's limit",
    )
    stop: Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stream_canvas: bool | None = None
    return_token_ids: bool | None = None
    ignore_eos: bool | None = None
    trace: bool | None = None
    timeout: Annotated[float, Field(gt=0, le=86_400)] | None = None
    guidance: Annotated[Guidance, BeforeValidator(_guidance, json_schema_input_type=Method | Guidance)] | None = None
    diffusion: Diffusion | None = None

    # Accepted without effect.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    # Accepted with the values that ask for nothing.
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: NoDict | None = None
    min_p: Zero | None = None
    min_tokens: ZeroInt | None = None
    repetition_penalty: One | None = None
    skip_special_tokens: Yes | None = None
    prompt_logprobs: None = None


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    prompt: Prompts
    suffix: Text | None = None
    chat_template: bool | None = None
    echo: No | None = None
    logprobs: None = None


class ResponseFormat(Strict):
    """Only text."""

    type: Literal["text"]


class ChatCompletionRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Count | None = Field(None, description="The newer name of `max_tokens`; both must agree")
    logprobs: No | None = None
    top_logprobs: ZeroInt | None = None
    tools: NoList | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    functions: NoList | None = None
    function_call: Literal["none", "auto"] | None = None
    response_format: ResponseFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None


Conversation = Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]


def _queries(value: object) -> object:
    """One text or one conversation is a list of one."""
    if isinstance(value, str):
        return [_turn(value)]
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return [value]
    if isinstance(value, list):
        return [_turn(item) if isinstance(item, str) else item for item in value]
    raise invalid("must be a prompt, a list of messages, or a list of those")


def _turn(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _documents(value: object) -> object:
    if not isinstance(value, str | list):
        raise invalid("must be a string or a list of strings")
    return [value] if isinstance(value, str) else value


MAX_PAIRS = 65_536
QueryList = Annotated[list[str | Conversation], Field(min_length=1, max_length=MAX_PAIRS)]
Queries = Annotated[
    list[Conversation],
    BeforeValidator(_queries, json_schema_input_type=str | Conversation | QueryList),
    Field(min_length=1, max_length=MAX_PAIRS),
]
DocumentList = Annotated[list[Content], Field(min_length=1, max_length=MAX_PAIRS)]
Documents = Annotated[DocumentList, BeforeValidator(_documents, json_schema_input_type=str | DocumentList)]


class ScoreRequest(Strict):
    """`POST /v1/score`: a query is a prompt or a conversation, a document is a response to it. One query goes with all
    documents; otherwise there are as many of the one as of the other."""

    model: Name | None = None
    queries: Queries
    documents: Documents
    user: str | None = None


def _query(value: object) -> object:
    if not isinstance(value, str | list):
        raise invalid("must be a prompt or a list of messages")
    return _turn(value) if isinstance(value, str) else value


class RerankRequest(Strict):
    """`POST /v1/rerank`: documents as responses to one query, best first."""

    model: Name | None = None
    query: Annotated[Conversation, BeforeValidator(_query, json_schema_input_type=str | Conversation)]
    documents: DocumentList
    top_n: Annotated[int, Field(ge=0, le=MAX_PAIRS)] | None = Field(None, description="0 or null: all")
    user: str | None = None


class TokenizeRequest(Strict):
    """`POST /tokenize`: either a raw prompt or messages in the chat template."""

    model_config = ConfigDict(json_schema_extra=PROMPT_OR_MESSAGES)

    model: Name | None = None
    prompt: Text | None = None
    messages: Conversation | None = None
    add_generation_prompt: bool | None = None
    add_special_tokens: No | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    """`POST /detokenize`."""

    model: Name | None = None
    tokens: list[TokenId]

"""The table of request fields: one row a field, with its type, bounds and default, what it does and when it applies.

From these rows come the schema that validates requests, the checks between fields, the OpenAPI document, the defaults
that `/v1/models` lists and the tables of docs/api.md. A new parameter is a row here, and its use; those of the object
`guidance` stand in `guidance`, and those that `/v1/responses` alone has in `responses`. They are strict (no "5" for 5,
no true for 1), and null is what leaving out is. Defaults that the engine knows are its own (`server.types`).

OpenAI's fields that a masked diffusion model cannot honour are rows with the values that ask for nothing, so that
clients which always send them work; any real value is refused by name, with the reason in `unsupported`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, get_args

from pydantic import BeforeValidator, ConfigDict, Field

from server.api.guidance import Guidance, GuidanceForms
from server.api.rules import Only, Strict, Within, invalid
from server.api.values import (
    MAX_PAIRS,
    ChatMessage,
    Conversation,
    Count,
    Documents,
    ModelName,
    NoList,
    Prompts,
    Queries,
    Query,
    RankingTemperature,
    Responses,
    ScoringModel,
    Seeds,
    Share,
    Stops,
    Temperature,
    TemplateArguments,
    Text,
    TokenId,
)
from server.types import (
    ADAPTIVE_ALGORITHMS,
    Algorithm,
    DiffusionParams,
    SamplingParams,
    Schedule,
)

_S, _D = SamplingParams(1), DiffusionParams(1)


def _algorithms(*names: str, but: bool = False) -> Any:
    chosen = [name for name in get_args(Algorithm) if (name in names) != but]
    return lambda: chosen


def _boolean(value: object) -> object:
    """`Literal` compares, and 0 equals False."""
    if type(value) is not bool:
        raise invalid("must be a boolean")
    return value


# Values that ask for nothing.
No: TypeAlias = Annotated[Literal[False], BeforeValidator(_boolean)]
Zero: TypeAlias = Annotated[float, Field(ge=0, le=0)]
ZeroInt: TypeAlias = Annotated[int, Field(ge=0, le=0)]

WRAPPED = Only("chat_template", lambda: [True], message="needs `chat_template`")
STREAM = Only("stream", lambda: [True], message="needs `stream`")


class Diffusion(Strict):
    """How the canvas is filled. With full attention `block_length` is at most `max_tokens`."""

    steps: Annotated[Count, Within("context")] | None = None
    """T, the number of denoising steps, or the most that an adaptive algorithm takes; left out: `max_tokens`"""
    algorithm: Algorithm = _D.algorithm
    """Which positions are revealed first"""
    algorithm_temperature: Annotated[
        RankingTemperature, Only("algorithm", _algorithms("origin", *ADAPTIVE_ALGORITHMS, but=True), idle=0)
    ] = 0.0
    """Draws the revealed positions by confidence; 0: takes the most confident"""
    entropy_bound: Annotated[float, Field(ge=0, le=1000), Only("algorithm", _algorithms("entropy_bound"))] = (
        _D.entropy_bound
    )
    """Nats that the positions revealed in one step may have in sum, without the largest"""
    confidence_threshold: Annotated[Share, Only("algorithm", _algorithms("threshold"))] = _D.confidence_threshold
    """Probability above which a position is revealed"""
    deprioritize_eos: Annotated[bool, Only("algorithm", _algorithms("origin", but=True), idle=False)] = (
        _D.deprioritize_eos
    )
    """Ranks positions whose drawn token ends the text after all others"""
    block_length: Annotated[Count, Within("context")] | None = None
    """Fills the canvas block by block from the left; left out: at once, with a block-causal model the length that it
    was trained with"""
    schedule: Annotated[Schedule, Only("algorithm", _algorithms("origin", but=True), idle="linear")] = _D.schedule
    """How many positions each step reveals"""
    cfg_scale: Annotated[float, Field(ge=0, le=100)] = _D.cfg_scale
    """Classifier-free guidance against a masked prompt; 0: none, and half the cost. Not with a block-causal model"""


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool = False
    """A last chunk with the usage of the whole request"""
    continuous_usage_stats: bool = False
    """The usage so far in every chunk"""
    include_obfuscation: No = False
    """Padding of chunks, which is not done"""


class GenerationRequest(Strict):
    """What all endpoints that generate share. `source` is the field that holds what is answered; an answer's id begins
    with `prefix`."""

    source: ClassVar[str]
    prefix: ClassVar[str]

    model: ModelName | None = None
    """The diffusion model; left out: the one that is served"""
    max_tokens: Annotated[Count, Within("canvas")] | None = None
    """L, the tokens of the canvas; with the prompt and the suffix they must fit the model's context"""
    temperature: Temperature = _S.temperature
    """0 takes the most probable token; not with `guidance.resample`, unless positions are drawn
    (`algorithm_temperature`, `origin`)"""
    top_p: Share = _S.top_p
    """Keeps the most probable tokens up to this mass"""
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    """Keeps this many tokens; 0, -1 or null: all"""
    seed: Seeds | None = None
    """The same seed gives the same answer, whatever else runs, up to rounding; a list: one for each
    prompt; left out: drawn, and reported"""
    n: Annotated[int, Field(ge=1, le=1024), Within("trajectories")] = _S.n
    """How many answers to each prompt come back"""
    best_of: Annotated[int, Field(ge=1, le=1024), Within("trajectories")] | None = None
    """K, the trajectories that run for each prompt, of which the `n` best come back: at least `n`, equal to it with
    method `none`, and at least 2 with `guidance.resample`; times the prompts within the server's limit"""
    stop: Stops | None = None
    """Up to four strings, each of which ends the text before it"""
    stream: bool = False
    """Server-sent events as the text grows"""
    stream_options: Annotated[StreamOptions | None, STREAM] = None
    """`include_usage` and `continuous_usage_stats`, as vLLM has them"""
    stream_canvas: Annotated[bool, Only("stream", lambda: [True], False, "needs `stream`")] = False
    """Also sends the canvas after every step"""
    return_token_ids: bool = False
    """`choices[].token_ids`: the L canvas tokens, special ones included; those of a block-causal model end with the
    block in which the text ends"""
    return_step_map: bool = False
    """`choices[].step_map`: the step at which each of these tokens was revealed"""
    ignore_eos: bool = False
    """The text and usage are all L tokens, whatever they hold"""
    trace: bool = False
    """Every step of every trajectory in the final object; a reward model that is named reads each once more for it"""
    timeout: Annotated[float, Field(gt=0, le=86_400)] | None = None
    """The seconds that the whole request may take; left out: the server's own limit, if it has one"""
    guidance: GuidanceForms = Field(default_factory=lambda: Guidance.model_validate({}))
    """How rewards steer: a method's name, `smc` (`bon` that resamples by reward), or an object"""
    diffusion: Diffusion = Field(default_factory=lambda: Diffusion.model_validate({}))
    """How the canvas is filled: an object"""

    metadata: dict[str, Any] | None = None
    """What outside scorers are given beside the conversation; without one it has no effect"""

    # Accepted without effect.
    user: str | None = None
    store: bool = False
    # Accepted with the values that ask for nothing.
    frequency_penalty: Zero = 0
    presence_penalty: Zero = 0
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    min_p: Zero = 0
    min_tokens: ZeroInt = 0
    repetition_penalty: Annotated[float, Field(ge=1, le=1)] = 1
    skip_special_tokens: Annotated[Literal[True], BeforeValidator(_boolean)] = True
    prompt_logprobs: None = None


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    source: ClassVar = "prompt"
    prefix: ClassVar = "cmpl-"

    prompt: Prompts
    """What to continue: a text or its token ids, or a list of either"""
    suffix: Text = ""
    """The text after the canvas (infilling). Not with a block-causal model"""
    chat_template: bool = False
    """Wraps each prompt as one user turn"""
    chat_template_kwargs: Annotated[TemplateArguments | None, WRAPPED] = None
    """Arguments of that template, as in chat completions"""
    echo: No = False
    logprobs: None = None


class ResponseFormat(Strict):
    """Only text."""

    type: Literal["text"]
    """Only text is generated"""


class Templated(Strict):
    """How messages are rendered."""

    continue_final_message: bool = False
    """The last message, an assistant's, begins the answer, which goes on from there and does not repeat it"""
    add_generation_prompt: Annotated[
        bool, Only("continue_final_message", lambda: [False], idle=False, message="and `{field}` exclude each other")
    ] = True
    """Opens the assistant's turn after the messages"""
    chat_template_kwargs: TemplateArguments | None = None
    """What the diffusion model's chat template is given beside the messages: strings, numbers, booleans and nulls by
    name, up to 8,192 characters of JSON"""


class ConversationRequest(GenerationRequest, Templated):
    """What chat completions and responses share. `canvas` names their newer word for `max_tokens`."""

    canvas: ClassVar[str]

    top_logprobs: ZeroInt = 0
    tools: NoList | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    service_tier: Literal["auto", "default"] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None

    @property
    @abstractmethod
    def turns(self) -> Sequence[ChatMessage]:
        """The conversation to answer."""


class ChatCompletionRequest(ConversationRequest):
    """`POST /v1/chat/completions`."""

    source: ClassVar = "messages"
    prefix: ClassVar = "chatcmpl-"
    canvas: ClassVar = "max_completion_tokens"

    messages: Conversation
    """The conversation to answer"""
    max_completion_tokens: Annotated[Count, Within("canvas")] | None = None
    """The newer name of `max_tokens`; both must agree"""
    logprobs: No = False
    functions: NoList | None = None
    function_call: Literal["none", "auto"] | None = None
    response_format: ResponseFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None

    @property
    def turns(self) -> Sequence[ChatMessage]:
        return self.messages


class ScoreRequest(Strict):
    """`POST /v1/score`: a query is a prompt or a conversation, a document is a response to it. One query goes with all
    documents; otherwise there are as many of the one as of the other."""

    model: ScoringModel | None = None
    """The reward model or scorer; left out: the first"""
    queries: Queries
    """One for all documents, or as many as documents"""
    documents: Responses
    """The responses whose rewards are wanted"""
    metadata: dict[str, Any] | None = None
    """What an outside scorer is given beside each pair; with a reward model it has no effect"""
    user: str | None = None


class RerankRequest(Strict):
    """`POST /v1/rerank`, `/v2/rerank` and `/rerank`: documents as responses to one query, best first."""

    model: ScoringModel | None = None
    """The reward model or scorer; left out: the first"""
    query: Query
    """What the documents respond to"""
    documents: Documents
    """The responses to order"""
    top_n: Annotated[int, Field(ge=0, le=MAX_PAIRS)] = 0
    """How many come back; 0 or null: all"""
    return_documents: bool = True
    """Whether results hold their documents"""
    metadata: dict[str, Any] | None = None
    """What an outside scorer is given beside each pair; with a reward model it has no effect"""
    user: str | None = None
    rank_fields: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    priority: ZeroInt = 0
    max_chunks_per_doc: None = None
    max_tokens_per_doc: None = None
    max_tokens_per_query: None = None
    truncate_prompt_tokens: None = None
    instruction: None = None
    relevant_spans: None = None


_PROMPT_OR_MESSAGES: dict[str, Any] = {
    "anyOf": [
        {
            "required": ["prompt"],
            "properties": {
                "prompt": {"type": "string"},
                "messages": {"type": "null"},
                **{name: {"type": "null"} for name in Templated.model_fields},
            },
        },
        {"required": ["messages"], "properties": {"messages": {"type": "array"}, "prompt": {"type": "null"}}},
    ]
}


class TokenizeRequest(Templated):
    """`POST /tokenize`: either a raw prompt or messages in the chat template."""

    model_config = ConfigDict(json_schema_extra=_PROMPT_OR_MESSAGES)

    model: ModelName | None = None
    """The diffusion model; left out: the one that is served"""
    prompt: Text | None = None
    """A text, tokenised as it stands"""
    messages: Conversation | None = None
    """A conversation, in the chat template"""
    add_special_tokens: No = False
    return_token_strs: bool = False
    """Also returns the text of each token"""


class DetokenizeRequest(Strict):
    """`POST /detokenize`."""

    model: ModelName | None = None
    """The diffusion model; left out: the one that is served"""
    tokens: list[TokenId]
    """The ids"""

"""From validated schemas to the engine's jobs: defaults, limits, and every rule that spans fields or needs the models.

Pure functions of the request, the models' descriptions and the limits; the tokenizer is the only thing called.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

from server.api.fields import ChatMessage, Prompt
from server.api.guidance import diffusion_params, guidance_params
from server.api.schemas import LEAST_TEMPERATURE, ChatCompletionRequest, CompletionRequest, GenerationRequest
from server.budget import Cost
from server.errors import InvalidRequest, UnknownModel, quote
from server.text.tokenizer import Tokenizer
from server.types import (
    EngineInfo,
    GuidanceParams,
    Job,
    Message,
    ModelInfo,
    SamplingParams,
)

DEFAULT_TEMPERATURE = 0.7
DEFAULT_TOP_P = 0.95
DEFAULT_BEST_OF = 4
SEED_BITS = 53  # a drawn seed survives clients whose numbers are doubles


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may ask for. `aliases` are the diffusion model's names besides its id."""

    max_trajectories: int = 128
    max_score_pairs: int = 1024
    max_score_characters: int = 4_000_000  # one query goes with each document, so the body's size is no bound
    request_timeout: float | None = None
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StreamMode:
    """How a request wants its stream. `live`: text is sent as it appears, not only when the best are known."""

    live: bool
    canvas: bool
    include_usage: bool
    continuous_usage: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """One request, ready for the engine: a job a prompt, and what the answer needs to know."""

    id: str
    created: int
    model: str
    chat: bool
    jobs: tuple[Job, ...]
    return_token_ids: bool
    trace: bool
    stream: StreamMode | None

    @property
    def sampling(self) -> SamplingParams:
        """The sampling parameters that all prompts share."""
        return self.jobs[0].sampling

    @property
    def guidance(self) -> GuidanceParams:
        """The guidance that all prompts share."""
        return self.jobs[0].guidance

    @property
    def prompt_tokens(self) -> int:
        """Tokens given: prompts and suffixes."""
        return sum(len(job.prompt_ids) + len(job.suffix_ids) for job in self.jobs)


@dataclass(frozen=True, slots=True)
class _Context:
    """One prompt as the diffusion model and the reward model see it."""

    prompt_ids: tuple[int, ...]
    conversation: tuple[Message, ...]
    suffix_ids: tuple[int, ...] = ()
    response_suffix: str = ""


def completion_plan(
    request: CompletionRequest, info: EngineInfo, tokenizer: Tokenizer, limits: Limits, identity: str
) -> Plan:
    """Jobs of a completion request. Raises InvalidRequest and UnknownModel."""
    check_model(request.model, info, limits.aliases)
    if len(request.prompt) > limits.max_trajectories:  # each has one at least
        raise InvalidRequest(
            f"`prompt` holds {len(request.prompt)} prompts; the limit is {limits.max_trajectories}", "prompt"
        )
    contexts = [_completion_context(request, prompt, info.model, tokenizer) for prompt in request.prompt]
    return _plan(request, request.max_tokens, contexts, info, limits, f"cmpl-{identity}", "prompt")


def chat_plan(
    request: ChatCompletionRequest, info: EngineInfo, tokenizer: Tokenizer, limits: Limits, identity: str
) -> Plan:
    """The job of a chat completion request. Raises InvalidRequest and UnknownModel."""
    check_model(request.model, info, limits.aliases)
    conversation = messages(request.messages)
    context = _Context(tuple(tokenizer.render_chat(conversation)), conversation)
    max_tokens = request.max_completion_tokens or request.max_tokens
    if request.max_tokens is not None and request.max_tokens != max_tokens:
        raise InvalidRequest("`max_tokens` and `max_completion_tokens` disagree", "max_tokens")
    return _plan(request, max_tokens, [context], info, limits, f"chatcmpl-{identity}", "messages")


def messages(turns: list[ChatMessage]) -> tuple[Message, ...]:
    """The turns as the inner layers know them."""
    return tuple(Message("system" if turn.role == "developer" else turn.role, turn.content) for turn in turns)


def check_model(name: str | None, info: EngineInfo, aliases: Sequence[str] = ()) -> None:
    """Raises UnknownModel unless `name` is the diffusion model's id or an alias of it (or left out)."""
    if name is None or name == info.model.id or name in aliases:
        return
    if any(name == reward.id for reward in info.reward_models):
        raise UnknownModel(f"{quote(name)} is a reward model; it scores text and generates none")
    raise UnknownModel(f"there is no model {quote(name)}; this server has {info.model.id}")


def new_seed() -> int:
    """A seed for a request that brings none; reported in its answer."""
    return secrets.randbits(SEED_BITS)


def _completion_context(request: CompletionRequest, prompt: Prompt, model: ModelInfo, tokenizer: Tokenizer) -> _Context:
    suffix = request.suffix or ""
    if request.chat_template:
        if not isinstance(prompt, str):
            raise InvalidRequest("`chat_template` needs a text prompt, not token ids", "chat_template")
        if not prompt:
            raise InvalidRequest("`prompt` must not be empty", "prompt")
        conversation = (Message("user", prompt),)
        try:
            ids = tokenizer.render_chat(conversation)
        except InvalidRequest as error:
            raise InvalidRequest(error.message, "chat_template") from error
        # The suffix continues the assistant's turn, where text is data.
        suffix_ids = tokenizer.encode_data(suffix) if suffix else []
        return _Context(tuple(ids), conversation, tuple(suffix_ids), suffix)
    if isinstance(prompt, str):
        text, ids = prompt, tokenizer.encode(prompt)
    else:
        if (wrong := next((token for token in prompt if token >= model.vocab_size), None)) is not None:
            raise InvalidRequest(
                f"`prompt`: token id {wrong} is outside the vocabulary of {model.vocab_size}", "prompt"
            )
        text, ids = tokenizer.decode(prompt, skip_special_tokens=False), prompt
    if not ids:
        raise InvalidRequest("`prompt` must not be empty", "prompt")
    suffix_ids = tokenizer.encode(suffix) if suffix else []
    return _Context(tuple(ids), (Message("user", text),), tuple(suffix_ids), suffix)


def _plan(
    request: GenerationRequest,
    max_tokens: int | None,
    contexts: list[_Context],
    info: EngineInfo,
    limits: Limits,
    identity: str,
    source: str,
) -> Plan:
    """The common half. `source` names the field that the contexts came from."""
    guidance = guidance_params(request.guidance, info)
    canvas = max_tokens if max_tokens is not None else info.model.default_max_tokens
    _check_length(canvas, max_tokens, contexts, info.model, source)
    diffusion = diffusion_params(request.diffusion, canvas, info.model.context_length, request.guidance)
    sampling = _sampling(request, canvas, guidance, len(contexts), limits)
    timeout = request.timeout if request.timeout is not None else limits.request_timeout
    now = time.time()
    stream = _stream_mode(request, sampling, guidance)
    jobs = tuple(
        Job(
            id=f"{identity}-{index}",
            prompt_ids=context.prompt_ids,
            sampling=sampling,
            diffusion=diffusion,
            guidance=guidance,
            prompt_index=index,
            suffix_ids=context.suffix_ids,
            conversation=context.conversation,
            response_suffix=context.response_suffix,
            deadline=None if timeout is None else now + timeout,
            stream_tokens=stream is not None and stream.live,
            stream_canvas=stream is not None and stream.canvas,
            trace=bool(request.trace),
        )
        for index, context in enumerate(contexts)
    )
    for job in jobs:
        # The worker, which knows the reward model's own count, checks again.
        Cost.of(job, reward_tokens=canvas).check(info.largest)
    return Plan(
        id=identity,
        created=int(now),
        model=info.model.id,
        chat=isinstance(request, ChatCompletionRequest),
        jobs=jobs,
        return_token_ids=bool(request.return_token_ids),
        trace=bool(request.trace),
        stream=stream,
    )


def _check_length(canvas: int, asked: int | None, contexts: list[_Context], model: ModelInfo, source: str) -> None:
    if canvas > model.context_length and asked is not None:
        raise InvalidRequest(
            f"`max_tokens` is {canvas}; the model's context is {model.context_length} tokens", "max_tokens"
        )
    for context in contexts:
        given = len(context.prompt_ids) + len(context.suffix_ids)
        if given + canvas > model.context_length:
            raise InvalidRequest(
                f"`{source}` takes {given} tokens and `max_tokens` {canvas} more; the model's context is "
                f"{model.context_length} tokens",
                source,
            )


def _sampling(
    request: GenerationRequest, canvas: int, guidance: GuidanceParams, prompts: int, limits: Limits
) -> SamplingParams:
    n = request.n or 1
    best_of = request.best_of
    if best_of is None:
        best_of = n if guidance.method == "none" else max(n, DEFAULT_BEST_OF)
    if best_of < n:
        raise InvalidRequest(f"`best_of` is {best_of}, less than `n`, which is {n}", "best_of")
    if guidance.method == "none" and best_of != n:
        raise InvalidRequest("`best_of` must equal `n` unless `guidance` names a method that chooses", "best_of")
    if best_of * prompts > limits.max_trajectories:
        field = "best_of" if request.best_of is not None else "n" if request.n is not None else "prompt"
        raise InvalidRequest(
            f"`best_of` x prompts is {best_of * prompts}; the limit is {limits.max_trajectories}", field
        )
    temperature = request.temperature if request.temperature is not None else DEFAULT_TEMPERATURE
    if 0 < temperature < LEAST_TEMPERATURE:
        raise InvalidRequest(f"`temperature` must be 0 or at least {LEAST_TEMPERATURE:g}", "temperature")
    return SamplingParams(
        max_tokens=canvas,
        temperature=temperature,
        top_p=request.top_p if request.top_p is not None else DEFAULT_TOP_P,
        top_k=request.top_k if request.top_k is not None and request.top_k > 0 else None,
        seed=request.seed if request.seed is not None else new_seed(),
        n=n,
        best_of=best_of,
        stop=tuple(request.stop or ()),
        ignore_eos=bool(request.ignore_eos),
    )


def _stream_mode(request: GenerationRequest, sampling: SamplingParams, guidance: GuidanceParams) -> StreamMode | None:
    if not request.stream:
        if request.stream_options is not None:
            raise InvalidRequest("`stream_options` needs `stream`", "stream_options")
        if request.stream_canvas:
            raise InvalidRequest("`stream_canvas` needs `stream`", "stream_canvas")
        return None
    options = request.stream_options
    return StreamMode(
        # With several answers in the order of their rewards, whose text is which choice is known only at the end.
        live=sampling.best_of == 1 or guidance.method == "none",
        canvas=bool(request.stream_canvas),
        include_usage=options is not None and bool(options.include_usage),
        continuous_usage=options is not None and bool(options.continuous_usage_stats),
    )

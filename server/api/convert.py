"""From a validated request to the engine's jobs: defaults that depend on the models, and every rule that spans fields
which no one row of `fields` can see.

Pure functions of the request, the models' descriptions and the settings; the tokenizer is the only thing called.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from server.api.fields import (
    CompletionRequest,
    ConversationRequest,
    Diffusion,
    GenerationRequest,
    Templated,
)
from server.api.guidance import Guidance
from server.api.rules import rewarders
from server.api.values import ChatMessage, Prompt
from server.budget import Cost
from server.errors import InvalidRequest
from server.methods import METHODS
from server.settings import Settings
from server.text.template import open_chat_ids
from server.text.tokenizer import Tokenizer
from server.types import (
    ADAPTIVE_ALGORITHMS,
    DiffusionParams,
    EngineInfo,
    GuidanceParams,
    Job,
    Message,
    ModelInfo,
    Resampling,
    SamplingParams,
    WeightedReward,
)

Asked = CompletionRequest | ConversationRequest
DEFAULT_BEST_OF = 4
SEED_BITS = 53  # a drawn seed survives clients whose numbers are doubles
BLOCK_CAUSAL = "is not for a block-causal model, which caches its prompt and writes from left to right"
RANKED_BY_ENTROPY = ("entropy", *ADAPTIVE_ALGORITHMS)


@dataclass(frozen=True, slots=True)
class Plan:
    """One request, ready for the engine: a job a prompt."""

    id: str
    created: int
    model: str
    asked: Asked
    jobs: tuple[Job, ...]

    @property
    def chat(self) -> bool:
        """Whether a conversation is answered, and not a text completed."""
        return isinstance(self.asked, ConversationRequest)

    @property
    def sampling(self) -> SamplingParams:
        """The sampling parameters that all prompts share, but for the seed, which is the first one's."""
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
    response_prefix: str = ""


def messages(turns: Sequence[ChatMessage]) -> tuple[Message, ...]:
    """The turns as the inner layers know them."""
    roles = ("system" if turn.role == "developer" else turn.role for turn in turns)
    return tuple(Message(role, turn.content, turn.name) for role, turn in zip(roles, turns, strict=True))


def templated(asked: Templated, turns: Sequence[Message], model: ModelInfo, tokenizer: Tokenizer) -> list[int]:
    """Ids of a conversation in the chat template, as a request wants it rendered. Raises InvalidRequest."""
    arguments = model.template_arguments | (asked.chat_template_kwargs or {})
    if not asked.continue_final_message:
        return tokenizer.render_chat(turns, asked.add_generation_prompt, arguments)
    if turns[-1].role != "assistant":
        message = "`continue_final_message` needs an assistant's message as the last one"
        raise InvalidRequest(message, "continue_final_message")
    return open_chat_ids(tokenizer, turns, arguments)


def _chat_context(request: ConversationRequest, model: ModelInfo, tokenizer: Tokenizer) -> _Context:
    turns = messages(request.turns)
    ids = tuple(templated(request, turns, model, tokenizer))
    if request.continue_final_message:
        return _Context(ids, turns[:-1], response_prefix=turns[-1].content)
    return _Context(ids, turns)


def _completion_context(request: CompletionRequest, prompt: Prompt, model: ModelInfo, tokenizer: Tokenizer) -> _Context:
    suffix = request.suffix
    if request.chat_template:
        if not isinstance(prompt, str):
            raise InvalidRequest("`chat_template` needs a text prompt, not token ids", "chat_template")
        if not prompt:
            raise InvalidRequest("`prompt` must not be empty", "prompt")
        conversation = (Message("user", prompt),)
        try:
            arguments = model.template_arguments | (request.chat_template_kwargs or {})
            ids = tokenizer.render_chat(conversation, arguments=arguments)
        except InvalidRequest as error:
            raise InvalidRequest(error.message, "chat_template") from error
        # The suffix continues the assistant's turn, where text is data.
        suffix_ids = tokenizer.encode_data(suffix) if suffix else []
        return _Context(tuple(ids), conversation, tuple(suffix_ids), suffix)
    if isinstance(prompt, str):
        text, ids = prompt, tokenizer.encode(prompt)
    else:
        text, ids = tokenizer.decode(prompt, skip_special_tokens=False), prompt
    if not ids:
        raise InvalidRequest("`prompt` must not be empty", "prompt")
    suffix_ids = tokenizer.encode(suffix) if suffix else []
    return _Context(tuple(ids), (Message("user", text),), tuple(suffix_ids), suffix)


def make_plan(request: Asked, info: EngineInfo, tokenizer: Tokenizer, settings: Settings, identity: str) -> Plan:
    """The jobs of a request: one a prompt, or that of a conversation. Raises InvalidRequest."""
    max_tokens, source, identity = request.max_tokens, request.source, request.prefix + identity
    if isinstance(request, ConversationRequest):
        contexts = [_chat_context(request, info.model, tokenizer)]
        max_tokens = getattr(request, request.canvas) or max_tokens
        if request.max_tokens is not None and request.max_tokens != max_tokens:
            raise InvalidRequest(f"`max_tokens` and `{request.canvas}` disagree", "max_tokens")
    else:
        contexts = [_completion_context(request, prompt, info.model, tokenizer) for prompt in request.prompt]
    guidance = _guidance(request.guidance, info, settings)
    canvas = max_tokens or info.model.default_max_tokens
    for context in contexts:
        given = len(context.prompt_ids) + len(context.suffix_ids)
        if given + canvas > info.model.context_length:
            message = f"`{source}` takes {given} tokens and `max_tokens` {canvas} more; the model's context is "
            raise InvalidRequest(f"{message}{info.model.context_length} tokens", source)
    if info.model.blocks_from and any(context.suffix_ids for context in contexts):
        raise InvalidRequest(f"`suffix` {BLOCK_CAUSAL}", "suffix")
    diffusion = _diffusion(request.diffusion, canvas, request.guidance, info.model)
    sampling = _sampling(request, canvas, guidance, len(contexts), settings)
    if guidance.resample is not None:
        _check_particles(sampling, diffusion)
    seeds = request.seed if isinstance(request.seed, list) else [sampling.seed] * len(contexts)
    if len(seeds) != len(contexts):
        raise InvalidRequest(f"`seed` holds {len(seeds)} seeds for {len(contexts)} prompts; give one each", "seed")
    timeout = request.timeout if request.timeout is not None else settings.request_timeout
    now = time.time()
    # With several answers in the order of their rewards, whose text is which choice is known only at the end; and a
    # trajectory may become another's copy.
    ordered = sampling.best_of == 1 or guidance.method == "none"
    live = request.stream and ordered and guidance.resample is None
    jobs = tuple(
        Job(
            id=f"{identity}-{index}",
            prompt_ids=context.prompt_ids,
            sampling=replace(sampling, seed=seeds[index]),
            diffusion=diffusion,
            guidance=guidance,
            prompt_index=index,
            suffix_ids=context.suffix_ids,
            conversation=context.conversation,
            response_prefix=context.response_prefix,
            response_suffix=context.response_suffix,
            deadline=None if timeout is None else now + timeout,
            stream_tokens=live,
            stream_canvas=request.stream_canvas,
            return_token_ids=request.return_token_ids,
            return_step_map=request.return_step_map,
            trace=request.trace,
        )
        for index, context in enumerate(contexts)
    )
    for job in jobs:
        # The worker, which knows the reward model's own count, checks again.
        cost = Cost.of(job, reward_tokens=canvas)
        cost.check(info.largest)
        if guidance.resample is not None:
            cost.check_together(info.shared, sampling.best_of)
    own = request.model is None or request.model in (info.model.id, *settings.served_model_name)
    return Plan(identity, int(now), info.model.id if own else str(request.model), request, jobs)


def trajectories(asked: GenerationRequest) -> int:
    """K: how many trajectories each prompt of a request has."""
    if asked.best_of is not None:
        return asked.best_of
    return asked.n if asked.guidance.method == "none" else max(asked.n, DEFAULT_BEST_OF)


def _guidance(asked: Guidance, info: EngineInfo, settings: Settings) -> GuidanceParams:
    if asked.start >= asked.stop:
        field = "guidance.stop" if "stop" in asked.model_fields_set else "guidance.start"
        raise InvalidRequest("`guidance.start` must be less than `guidance.stop`", field)
    terms = tuple(WeightedReward(term.model, term.weight) for term in asked.reward_models or ())
    names = [term.model for term in terms]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise InvalidRequest(f"reward model {name} is named twice", f"guidance.reward_models.{index}.model")
    gradient, steers = rewarders(info, settings), METHODS[asked.method].weight is not None
    rewarded = asked.method != "none" if asked.resample is None else asked.resample.by == "reward"
    if asked.reward_model is not None:
        terms = (WeightedReward(asked.reward_model),)
    elif not terms and (steers or rewarded):
        first = next((name for name in gradient if gradient[name] or not steers), None)
        if first is None:
            what = asked.method if asked.resample is None else "that resamples by reward"
            raise InvalidRequest(f"`guidance` {what} needs a reward model, and none is loaded", "guidance")
        terms = (WeightedReward(first),)
    if steers and not any(gradient[term.model] for term in terms):
        field = "guidance.reward_models" if asked.reward_model is None else "guidance.reward_model"
        named = ", ".join(term.model for term in terms)
        message = f"`{field}`: method {asked.method} needs a reward model with a gradient, and none of {named} has one"
        raise InvalidRequest(message, field)
    own = {each.name: getattr(asked, each.name) for each in fields(GuidanceParams) if hasattr(asked, each.name)}
    return GuidanceParams(
        **own
        | {
            "reward_models": tuple(term for term in terms if gradient[term.model]),
            "scorers": tuple(term for term in terms if not gradient[term.model]),
            "resample": asked.resample and Resampling(**dict(asked.resample)),
        }
    )


def _diffusion(asked: Diffusion, canvas: int, guidance: Guidance, model: ModelInfo) -> DiffusionParams:
    own = dict(asked) | {"blocks_from": model.blocks_from}
    own |= {name: value for name, value in model.diffusion_defaults.items() if name not in asked.model_fields_set}
    if "confidence" in guidance.model_fields_set and own["algorithm"] not in RANKED_BY_ENTROPY:
        message = f"`guidance.confidence` has no effect with algorithm {own['algorithm']}"
        raise InvalidRequest(message, "guidance.confidence")
    if model.blocks_from and asked.cfg_scale:
        raise InvalidRequest(f"`diffusion.cfg_scale` {BLOCK_CAUSAL}", "diffusion.cfg_scale")
    if not model.blocks_from:
        if asked.block_length is not None and asked.block_length > canvas:
            message = f"`diffusion.block_length` is {asked.block_length}, more than the {canvas} tokens to fill"
            raise InvalidRequest(message, "diffusion.block_length")
        own["block_length"] = own["block_length"] and min(own["block_length"], canvas)
    made_up = {"steps": asked.steps or canvas, "algorithm_temperature": asked.algorithm_temperature or None}
    return DiffusionParams(**own | made_up)


def _sampling(
    request: GenerationRequest, canvas: int, guidance: GuidanceParams, prompts: int, settings: Settings
) -> SamplingParams:
    n, best_of = request.n, trajectories(request)
    if best_of < n:
        raise InvalidRequest(f"`best_of` is {best_of}, less than `n`, which is {n}", "best_of")
    if guidance.method == "none" and best_of != n:
        raise InvalidRequest("`best_of` must equal `n` unless `guidance` names a method that chooses", "best_of")
    if best_of * prompts > settings.max_trajectories:
        field = next((name for name in ("best_of", "n") if name in request.model_fields_set), "prompt")
        raise InvalidRequest(
            f"`best_of` x prompts is {best_of * prompts}; the limit is {settings.max_trajectories}", field
        )
    return SamplingParams(
        max_tokens=canvas,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k if request.top_k is not None and request.top_k > 0 else None,
        seed=request.seed if isinstance(request.seed, int) else secrets.randbits(SEED_BITS),
        n=n,
        best_of=best_of,
        stop=tuple(request.stop or ()),
        ignore_eos=request.ignore_eos,
    )


def _check_particles(sampling: SamplingParams, diffusion: DiffusionParams) -> None:
    """Raises InvalidRequest where resampling could do nothing: of one trajectory, or of copies that stay the same."""
    if sampling.best_of == 1:
        message = "`best_of` is 1, and `guidance.resample` needs at least 2 trajectories (with method none as many `n`)"
        raise InvalidRequest(message, "best_of")
    # Where `origin` reveals is drawn at every temperature.
    if not (sampling.temperature or diffusion.algorithm_temperature or diffusion.algorithm == "origin"):
        raise InvalidRequest(
            "`temperature` 0 would keep the copies that `guidance.resample` makes the same: it must be above 0, or "
            "`diffusion.algorithm_temperature` must be",
            "temperature",
        )

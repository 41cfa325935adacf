"""Routes for operators and tools: liveness, readiness, version, metrics, models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Literal, TypeVar, get_args

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from server import __version__
from server.api.answers import Answer
from server.api.build import commit
from server.api.convert import DEFAULT_BEST_OF
from server.api.fields import CompletionRequest, Diffusion
from server.api.frontend import Frontend
from server.api.guidance import Guidance
from server.api.metrics import CONTENT_TYPE
from server.api.openapi import errors, success
from server.api.rules import Served
from server.errors import EngineUnusable, NotReady, UnknownModel, quote
from server.types import Algorithm, EngineInfo, ModelInfo, RewardModelInfo

router = APIRouter()
Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])


def readable(path: str, on: APIRouter = router, **documented: Any) -> Callable[[Endpoint], Endpoint]:
    """Register a GET route, and HEAD beside it (load balancers probe with it): the same answer, from which the HTTP
    server leaves the body out. The OpenAPI document has the GET only, which HEAD follows by definition."""

    def register(endpoint: Endpoint) -> Endpoint:
        on.get(path, **documented)(endpoint)
        on.head(path, include_in_schema=False)(endpoint)
        return endpoint

    return register


class Status(Answer):
    """One word."""

    status: Literal["ok", "ready"]
    """The word"""


class Version(Answer):
    """The server's version, and the commit that its code is of (`-dirty`: with changes; or `unknown`)."""

    version: str
    """The release"""
    commit: str
    """The commit that runs, where it is known"""


class Model(Answer):
    """A loaded model. `type` says what it can be used for; the fields that only one kind has are null for the other.
    `root` is the model's own id, whichever of its names (`id`) this entry is for. `chat` says that it has a chat
    template; without one `/v1/chat/completions` is refused. `limits` are those of one request that a server sets."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "entrgi"
    """Always the same"""
    root: str
    """The model's own id, whichever of its names `id` is"""
    parent: str | None = None
    """An adapter's base; null for all other models"""
    type: Literal["diffusion", "reward", "scorer"]
    """What the model does: a scorer rewards texts, and has no gradient that could guide"""
    family: str
    """The architecture; of an outside scorer what answers for it"""
    context_length: int | None = None
    """Tokens that it reads at most; like all sizes not known of an outside scorer"""
    max_model_len: int | None = None
    """The same, under vLLM's name"""
    dtype: str | None = None
    """The weights' type"""
    parameters: int | None = None
    """Weights, embeddings included; adapters are not counted"""
    vocab_size: int | None = None
    """Tokens of its vocabulary"""
    mask_token_id: int | None = None
    """The token of a masked position"""
    eos_token_id: int | None = None
    """The token that ends a text"""
    attention: Literal["full", "block_causal"] | None = None
    """Whether it writes block by block, each seeing what is before it, or sees its whole canvas"""
    guidance_methods: list[str] | None = None
    """Methods that `guidance` may name here"""
    algorithms: list[str] | None = None
    """Values of `diffusion.algorithm`"""
    chat: bool | None = None
    """Whether it has a chat template"""
    defaults: dict[str, Any] | None = None
    """The value of every field that is left out; `best_of` by method"""
    limits: dict[str, Any] | None = None
    """What one request may hold, and how much of one answer the memory takes"""
    label: str | None = None
    """The label whose score it is, of a reward model with several"""
    output: Literal["logit", "log_softmax"] | None = None
    """Whether a reward is the label's logit, or its log probability among all labels"""
    input: Literal["response", "pair"] | None = None
    """What an encoder reads: the response alone, or what it answers too"""
    vocab_coverage: float | None = None
    """Share of the diffusion model's tokens that the reward model has too"""
    vocab_fallback: Literal["unk", "zero"] | None = None
    """What stands for the other tokens"""


class ModelList(Answer):
    """Diffusion models and their adapters first, then reward models, then outside scorers."""

    object: Literal["list"]
    data: list[Model]
    """The models"""


def frontend_of(request: Request) -> Frontend:
    """The application's frontend."""
    frontend: Frontend = request.app.state.frontend
    return frontend


@readable("/health", responses=success(Status, "Alive") | errors(503))
async def health(request: Request) -> Response:
    """503 only when the process must be restarted."""
    if frontend_of(request).failure is not None:
        raise EngineUnusable("the engine could not be started")
    return JSONResponse({"status": "ok"})


@readable("/ready", responses=success(Status, "Can serve") | errors(503))
async def ready(request: Request) -> Response:
    """503 while loading, draining or without a worker."""
    engine = frontend_of(request).engine
    if not engine.ready:
        engine.check_room()
        raise NotReady("no worker is ready to take requests")
    return JSONResponse({"status": "ready"})


@readable("/ping", responses=success(Status, "Alive") | errors())
async def ping() -> Response:
    """Always the same answer."""
    return JSONResponse({"status": "ok"})


@readable("/version", responses=success(Version, "Version") | errors(503))
async def version() -> Response:
    """The server's version."""
    return JSONResponse({"version": __version__, "commit": commit()})


@readable(
    "/metrics",
    response_class=Response,
    responses={200: {"description": "Prometheus metrics", "content": {"text/plain": {}}}, **errors()},
)
async def metrics(request: Request) -> Response:
    """Metrics in Prometheus's text format."""
    return Response(frontend_of(request).metrics.render(), headers={"Content-Type": CONTENT_TYPE})


@readable("/v1/models", responses=success(ModelList, "All loaded models") | errors(503))
async def models(request: Request) -> Response:
    """What is loaded, with defaults."""
    listed = await models_of(frontend_of(request))
    return JSONResponse({"object": "list", "data": [model.model_dump() for model in listed]})


@readable("/v1/models/{model_id:path}", responses=success(Model, "One model") | errors(404, 503))
async def model(request: Request, model_id: str) -> Response:
    """One loaded model."""
    for each in await models_of(frontend_of(request)):
        if each.id == model_id:
            return JSONResponse(each.model_dump())
    raise UnknownModel(f"there is no model {quote(model_id)}")


async def models_of(frontend: Frontend) -> list[Model]:
    """The diffusion model under each of its names, its adapters, then the reward models, then outside scorers."""
    engine, settings = frontend.engine.info, frontend.settings
    served = Served.of(engine, settings, frontend.engine.adapters.names)

    def described(info: ModelInfo | RewardModelInfo) -> dict[str, Any]:
        own = {name: value for name, value in asdict(info).items() if name in Model.model_fields}
        return own | {"created": frontend.created, "root": info.id, "max_model_len": info.context_length}

    model = Model(
        **described(engine.model),
        type="diffusion",
        attention="block_causal" if engine.model.blocks_from else "full",
        guidance_methods=list(served.methods),
        algorithms=list(get_args(Algorithm)),
        chat=(await frontend.tokenizer()).has_chat_template,
        defaults=_defaults(engine, served, settings.request_timeout),
        limits={
            "trajectories": settings.max_trajectories,
            "score_pairs": settings.max_score_pairs,
            "canvas_tokens": engine.largest.tokens,
            "guided_rows": engine.largest.guided_rows,
            "reward_tokens": engine.largest.reward_tokens,
        },
    )
    rewards = [
        Model(**described(reward), type="reward" if reward.gradient else "scorer") for reward in engine.reward_models
    ]
    scorers = [
        Model(id=each.name, created=frontend.created, root=each.name, type="scorer", family=each.kind)
        for each in settings.scorers
    ]
    under = {name: {"id": name} for name in served.models}
    under |= {name: {"id": name, "root": name, "parent": engine.model.id} for name in served.adapters}
    return [*(model.model_copy(update=update) for update in under.values()), *rewards, *scorers]


def _defaults(engine: EngineInfo, served: Served, timeout: float | None) -> dict[str, Any]:
    """Every field's value when it is left out, by the field's own name; none for fields that are then not there."""
    rows = {**CompletionRequest.model_fields, **Diffusion.model_fields, **Guidance.model_fields}
    values = {name: row.default for name, row in rows.items() if row.description}
    model = engine.model
    values |= model.diffusion_defaults | {"chat_template_kwargs": model.template_arguments or None}
    values["guidance"] = values.pop("method")
    values["max_tokens"] = values["steps"] = model.default_max_tokens
    if values["block_length"] and not model.blocks_from:
        values["block_length"] = min(values["block_length"], model.default_max_tokens)
    values["best_of"] = {method: 1 if method == "none" else DEFAULT_BEST_OF for method in served.methods}
    values["reward_model"] = next(iter(served.reward_models), None)
    values["timeout"] = timeout
    known = ("reward_model", "timeout")
    return {
        name: value for name, value in values.items() if name in known or isinstance(value, int | float | str | dict)
    }

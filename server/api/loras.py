"""Loading and unloading LoRA adapters while the server runs: routes that the setting `allow_runtime_lora` opens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import Field
from starlette.responses import JSONResponse, Response

from server.api.answers import Answer
from server.api.body import posts
from server.api.frontend import Frontend
from server.api.ops import Model, models_of
from server.api.rules import Strict
from server.api.values import Text
from server.errors import InvalidRequest, quote
from server.wire.config import NAME

router = APIRouter()


class LoadAdapterRequest(Strict):
    """`POST /v1/load_lora_adapter`, as vLLM has it."""

    lora_name: Annotated[str, Field(pattern=NAME)]
    """The model's name from now on"""
    lora_path: Annotated[Text, Field(min_length=1, max_length=4096)]
    """Its folder below the setting `lora_dir`, as a path from there or a whole one"""
    load_inplace: bool = False
    """Takes the place of the adapter of that name"""


class UnloadAdapterRequest(Strict):
    """`POST /v1/unload_lora_adapter`, as vLLM has it."""

    lora_name: Text
    """A loaded adapter"""


class Unloaded(Answer):
    """Answer to `POST /v1/unload_lora_adapter`."""

    id: str
    """The adapter's name"""
    object: Literal["model"]
    """What it was"""
    deleted: Literal[True]
    """That it is gone"""


@posts(router, ["/v1/load_lora_adapter"], LoadAdapterRequest, Model, "The adapter, as `/v1/models` has it")
async def load_lora_adapter(frontend: Frontend, asked: LoadAdapterRequest) -> Response:
    """Load an adapter, or its next version, in every worker."""
    served, name = frontend.served, asked.lora_name
    if served is not None and name in {*served.models, *served.reward_models} - {*served.adapters}:
        raise InvalidRequest(f"{quote(name)} is the name of another model", "lora_name")
    assert frontend.settings.lora_dir is not None  # without it there are no such routes (settings)
    within = Path(frontend.settings.lora_dir)
    await frontend.engine.adapters.load(name, within / asked.lora_path, within, in_place=asked.load_inplace)
    frontend.metrics.introduce(name)
    (model,) = [each for each in await models_of(frontend) if each.id == name]
    return JSONResponse(model.model_dump())


@posts(router, ["/v1/unload_lora_adapter"], UnloadAdapterRequest, Unloaded, "The adapter is gone")
async def unload_lora_adapter(frontend: Frontend, asked: UnloadAdapterRequest) -> Unloaded:
    """Unload an adapter; requests that were accepted before are still answered."""
    await frontend.engine.adapters.unload(asked.lora_name)
    return Unloaded(id=asked.lora_name, object="model", deleted=True)

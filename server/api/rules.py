"""What a field's annotation may say beyond pydantic's own. The object that enforces a rule also writes it into the JSON
schema, so that the OpenAPI document is as wide as the server.

What JSON Schema cannot say (that `best_of` is at least `n`, that prompt and `max_tokens` fit the context together) is
checked in `convert` and stands in the fields' descriptions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationInfo, model_validator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from server.errors import InvalidRequest, UnknownModel, quote
from server.methods import METHODS
from server.settings import Settings
from server.types import EngineInfo

Schema = dict[str, Any]
DOCUMENTED: ContextVar[Served | None] = ContextVar("documented", default=None)
"""The server whose bounds go into JSON schemas; None while they are not known, which leaves them out."""


@dataclass(frozen=True, slots=True)
class Served:
    """What the loaded models and this server's limits make of the fields' bounds. Validation takes it as its context;
    without one (before the models are loaded) those bounds are not checked."""

    models: tuple[str, ...]
    adapters: tuple[str, ...]
    reward_models: tuple[str, ...]
    methods: tuple[str, ...]
    context: int
    canvas: int
    vocabulary: int
    trajectories: int
    pairs: int
    terms: int
    defaults: Mapping[str, str | int]

    @classmethod
    def of(cls, info: EngineInfo, settings: Settings, adapters: tuple[str, ...]) -> Served:
        """Of one server, with what is loaded now. The adapters are among the models."""
        rewards = rewarders(info, settings)
        return cls(
            models=(info.model.id, *settings.served_model_name[1:], *adapters),
            adapters=adapters,
            reward_models=tuple(rewards),
            methods=tuple(name for name, method in METHODS.items() if method.weight is None or any(rewards.values())),
            context=info.model.context_length,
            canvas=info.model.context_length - 1,  # there is a prompt
            vocabulary=info.model.vocab_size - 1,
            trajectories=settings.max_trajectories,
            pairs=settings.max_score_pairs,
            terms=max(1, len(rewards)),
            defaults=info.model.diffusion_defaults,
        )


def rewarders(info: EngineInfo, settings: Settings) -> dict[str, bool]:
    """Whatever can reward a text here, by name, and whether it has a gradient. Outside scorers are last."""
    loaded = {reward.id: reward.gradient for reward in info.reward_models}
    return loaded | dict.fromkeys((each.name for each in settings.scorers), False)


def invalid(message: str) -> PydanticCustomError:
    """An error whose text pydantic takes as it stands; the field's path comes before it."""
    return PydanticCustomError("invalid", "{message}", {"message": message})


class Strict(BaseModel):
    """Base of all request objects: no coercion, no unknown fields, no NaN or infinity; null is what leaving out is."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, frozen=True, protected_namespaces=(),
        use_attribute_docstrings=True,
    )  # fmt: skip

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None or name not in cls.model_fields}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> Schema:
        """The object's schema, with null for every field that may be left out, and the rules between its fields."""
        made = handler.resolve_ref_schema(handler(schema))
        required, served = made.get("required", ()), DOCUMENTED.get()
        for name, field in made.get("properties", {}).items():
            if name not in required and field.get("type") != "null":
                kept = {key: field.pop(key) for key in ("title", "description", "default") if key in field}
                branches = field.pop("anyOf", None) or [dict(field)]
                null = [] if {"type": "null"} in branches else [{"type": "null"}]
                field.clear()
                field.update({"anyOf": [*branches, *null], **kept})
            if served is not None and name in served.defaults:
                field["default"] = served.defaults[name]
        rules: dict[Only, list[str]] = {}
        for name, each in cls.model_fields.items():
            for rule in each.metadata:
                if isinstance(rule, Only):
                    rules.setdefault(rule, []).append(name)
        if rules:
            made["allOf"] = [rule.schema(names, cls.model_fields[rule.field].default) for rule, names in rules.items()]
        return made


class Rule(ABC):
    """What stands in a field's annotation and checks each value that is sent."""

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_after_validator_function(self.check, handler(source))

    @abstractmethod
    def check(self, value: Any, info: ValidationInfo) -> Any:
        """The value, unless it breaks the rule; then it raises."""


@dataclass(frozen=True, slots=True)
class Only(Rule):
    """The field has an effect only where the one named `field`, which stands before it, has one of `values`. Elsewhere
    it is refused, unless it is `idle`: a value that asks for nothing."""

    field: str
    values: Callable[[], Sequence[object]]
    idle: object = None
    message: str = "has no effect with {field} {value}"

    def check(self, value: Any, info: ValidationInfo) -> Any:
        if value == self.idle or self.field not in info.data:  # not there: it is wrong itself
            return value
        other = info.data[self.field]
        if other not in self.values():
            raise invalid(self.message.format(field=self.field, value=other))
        return value

    def schema(self, names: list[str], default: object) -> Schema:
        """The rule for some fields; `default` is what the other field is when it is left out."""
        values = [*self.values()]
        there: Schema = {"required": [self.field]}
        if default in values:
            values, there = [*values, None] if None not in values else values, {}
        idle = {"type": "null"} if self.idle is None else {"enum": [self.idle, None]}
        idles = {"properties": dict.fromkeys(names, idle)}
        return {"anyOf": [{"properties": {self.field: {"enum": values}}, **there}, idles]}


@dataclass(frozen=True, slots=True)
class Within(Rule):
    """A bound of this server, the attribute `bound` of `Served`: the largest number, or the most items."""

    bound: str

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> Schema:
        made = handler(schema)
        served = DOCUMENTED.get()
        bound = None if served is None else getattr(served, self.bound)
        keyword = {"array": "maxItems", "integer": "maximum"}.get(made.get("type", ""))
        if isinstance(bound, tuple):
            made |= {"enum": [*bound]} if bound else {}
        elif bound is not None and keyword is not None:
            made.pop("exclusiveMaximum", None)
            made[keyword] = min(bound, made.get(keyword, bound))
        return made

    def check(self, value: Any, info: ValidationInfo) -> Any:
        if info.context is not None:
            most = getattr(info.context, self.bound)
            if isinstance(value, int) and value > most:
                raise invalid(f"must be at most {most} on this server (got {value})")
            if isinstance(value, list) and len(value) > most:
                raise invalid(f"must have at most {most} items on this server, not {len(value)}")
        return value


@dataclass(frozen=True, slots=True)
class Listed(Within):
    """A name, which the attribute `bound` of `Served` must hold; else `refuse` gives the error."""

    refuse: Callable[[str, Served], Exception]

    def check(self, value: Any, info: ValidationInfo) -> Any:
        if info.context is not None and value not in getattr(info.context, self.bound):
            raise self.refuse(value, info.context)
        return value


def no_such_model(name: str, served: Served) -> Exception:
    """Why a diffusion model of this name does not answer."""
    if name in served.reward_models:
        return UnknownModel(f"{quote(name)} is a reward model; it scores text and generates none")
    return UnknownModel(f"there is no model {quote(name)}; this server has {served.models[0]}")


def no_such_reward_model(name: str, served: Served) -> Exception:
    """Why a reward model of this name does not score."""
    loaded = ", ".join(served.reward_models) or "none"
    return UnknownModel(f"there is no reward model {quote(name)}; loaded: {loaded}")


def not_loaded(name: str, served: Served) -> Exception:
    """Why a reward model of this name does not guide: the request's own field is wrong."""
    return invalid(f"names {quote(name)}, which is not loaded; loaded: {', '.join(served.reward_models) or 'none'}")


def no_gradient(method: str, _: Served) -> Exception:
    """Why a method cannot guide here."""
    return InvalidRequest(f"`guidance` {method} needs a reward model with a gradient, and none is loaded", "guidance")

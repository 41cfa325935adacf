"""What the loaded models and this server's limits make of the document's request schemas.

A schema alone allows what any server might take; with these bounds a client (or a fuzzer) sees what this one does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from server.api.convert import Limits
from server.api.openapi import Document
from server.types import EngineInfo

_GENERATE = ("CompletionRequest", "ChatCompletionRequest")
_TEXT = (*_GENERATE, "TokenizeRequest", "DetokenizeRequest")
_REWARD = ("ScoreRequest", "RerankRequest")


def narrow(document: Document, info: EngineInfo, limits: Limits) -> None:
    """Write the bounds into the document."""
    schemas = document["components"]["schemas"]
    rewards = [reward.id for reward in info.reward_models]
    context, last = info.model.context_length, info.model.vocab_size - 1
    for name in _TEXT:
        _enum(schemas[name], "model", [info.model.id, *limits.aliases])
    for name in _GENERATE:
        for field in ("n", "best_of"):
            _bound(schemas[name], field, "maximum", limits.max_trajectories)
        for field in ("max_tokens", "max_completion_tokens"):
            _bound(schemas[name], field, "maximum", context - 1)  # there is a prompt
    for field in ("steps", "block_length"):
        _bound(schemas["Diffusion"], field, "maximum", context)
    for form in schemas["CompletionRequest"]["properties"]["prompt"]["anyOf"]:
        _tokens(form, last)
        if form.get("items", {}).get("type") in ("string", "array"):
            form["maxItems"] = limits.max_trajectories
    _tokens(schemas["DetokenizeRequest"]["properties"]["tokens"], last)
    if not rewards:
        _enum(schemas["Guidance"], "method", ["none"])
        return
    for name in _REWARD:
        _enum(schemas[name], "model", rewards)
        _bound(schemas[name], "documents", "maxItems", limits.max_score_pairs)
    for form in _branches(schemas["ScoreRequest"], "queries"):
        if "anyOf" in form.get("items", {}):  # a list of queries, not the turns of one
            form["maxItems"] = limits.max_score_pairs
    _enum(schemas["Guidance"], "reward_model", rewards)
    _bound(schemas["Guidance"], "reward_models", "maxItems", len(rewards))
    _enum(schemas["RewardTerm"], "model", rewards)


def _branches(schema: dict[str, Any], field: str) -> list[dict[str, Any]]:
    """The field's schema, or the schemas it may match."""
    found = schema["properties"].get(field)
    if found is None:
        return []
    return [branch for branch in found.get("anyOf", [found]) if branch.get("type") != "null"]


def _bound(schema: dict[str, Any], field: str, keyword: str, most: int) -> None:
    for branch in _branches(schema, field):
        if keyword in branch:
            branch[keyword] = min(branch[keyword], most)


def _enum(schema: dict[str, Any], field: str, values: Sequence[str]) -> None:
    for branch in _branches(schema, field):
        branch.clear()
        branch.update({"type": "string", "enum": list(values)})


def _tokens(schema: dict[str, Any], last: int) -> None:
    """The largest token id, in a schema of arrays of them."""
    while schema.get("type") == "array":
        schema = schema["items"]
    if schema.get("type") == "integer":
        schema.pop("exclusiveMaximum", None)
        schema["maximum"] = last

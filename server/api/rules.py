"""Rules between the fields of one object, as JSON Schema, so that the OpenAPI document is no wider than the server.

They are enforced in `convert` and `guidance`, whose messages explain them. What JSON Schema cannot say (that `best_of`
is at least `n`, that the prompt and `max_tokens` fit the context) stands in the fields' descriptions.
"""

from __future__ import annotations

from typing import Any, get_args

from server.methods import gradient_methods
from server.types import ADAPTIVE_ALGORITHMS, Algorithm

Rule = dict[str, Any]

GRADIENT_FIELDS = ("gradient_steps", "eta", "confidence", "start", "stop", "every")


def _absent(*names: str) -> Rule:
    return {"properties": {name: {"type": "null"} for name in names}}


def _one_of(name: str, *values: object) -> Rule:
    """The field has one of these values; without a null among them it must be there."""
    return {"properties": {name: {"enum": list(values)}}, **({} if None in values else {"required": [name]})}


def _algorithms_but(*names: str) -> Rule:
    return _one_of("algorithm", *(name for name in get_args(Algorithm) if name not in names), None)


STREAM: Rule = {
    "anyOf": [
        _one_of("stream", True),
        {"properties": {"stream_options": {"type": "null"}, "stream_canvas": {"enum": [False, None]}}},
    ]
}
"""`stream_options` and `stream_canvas` belong to streams."""


def guidance(schema: Rule) -> None:
    """Add to a schema: without a gradient there is none to set, and rewards are named in one way."""
    schema["allOf"] = [
        {"anyOf": [_one_of("method", *gradient_methods()), _absent(*GRADIENT_FIELDS)]},
        {"anyOf": [_absent("reward_model"), _absent("reward_models")]},
    ]


DIFFUSION: Rule = {
    "allOf": [
        {"anyOf": [_one_of("algorithm", "entropy_bound"), _absent("entropy_bound")]},
        {"anyOf": [_one_of("algorithm", "threshold"), _absent("confidence_threshold")]},
        {
            "anyOf": [
                _algorithms_but("origin", *ADAPTIVE_ALGORITHMS),
                {"properties": {"algorithm_temperature": {"enum": [0, None]}}},
            ]
        },
        {
            "anyOf": [
                _algorithms_but("origin"),
                {"properties": {"deprioritize_eos": {"enum": [False, None]}, "schedule": {"enum": ["linear", None]}}},
            ]
        },
    ]
}
"""A number of one algorithm means nothing to another."""

PROMPT_OR_MESSAGES: Rule = {
    "anyOf": [
        {
            "required": ["prompt"],
            "properties": {
                "prompt": {"type": "string"},
                "messages": {"type": "null"},
                "add_generation_prompt": {"type": "null"},
            },
        },
        {
            "required": ["messages"],
            "properties": {"messages": {"type": "array"}, "prompt": {"type": "null"}},
        },
    ]
}
"""Either a raw prompt or a conversation."""


def zero_or_more_than(least: float, most: float) -> Rule:
    """A number that is 0, or lies between both bounds."""
    return {"type": "number", "anyOf": [{"const": 0}, {"minimum": least, "maximum": most}]}

"""What Schemathesis has to know beside the document: rules between values, which JSON Schema cannot state.

The document states them in words. A valid body is made to keep them, so that "a valid body is accepted" can be checked
with nothing excepted; invalid bodies go out as generated. `tests/api/test_bad_input.py` breaks each rule on purpose.
"""

from __future__ import annotations

from typing import Any

import schemathesis
from schemathesis import GenerationMode

CANVAS = 4  # tokens to generate where a body asks for more: a prompt has room, thousands of requests take minutes
CHARACTERS = 24  # of a text, so that all texts of a body fit the context together
TEXTS = {"prompt", "suffix", "messages", "input", "instructions", "query", "queries", "documents", "document"}
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    """Make a valid body keep the rules."""
    if case.meta is None or case.meta.generation.mode != GenerationMode.POSITIVE or not isinstance(case.body, dict):
        return
    body = case.body = whole(case.body)
    for name in TEXTS & body.keys():
        body[name] = short(body[name])
    if body.get("continue_final_message"):
        if body.get("messages"):
            body["messages"][-1]["role"] = "assistant"
        else:  # the turns of a response may be a text alone
            body["continue_final_message"] = None
    if case.path.endswith(("completions", "responses")):
        generation(body)
    elif case.path == "/v1/score":
        pairs(body)


def whole(value: Any) -> Any:
    """Numbers like 2.0 as 2: both are integers to JSON Schema, and the server wants them without a fraction."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [whole(each) for each in value]
    if isinstance(value, dict):
        return {name: whole(each) for name, each in value.items()}
    return value


def short(value: Any) -> Any:
    """Texts cut, and lists of them."""
    if isinstance(value, str):
        return value[:CHARACTERS]
    if isinstance(value, list):
        return [short(each) for each in value[:2]]
    if isinstance(value, dict):
        return {name: short(each) if name in ("content", "text") else each for name, each in value.items()}
    return value


def generation(body: dict[str, Any]) -> None:
    """The rules of completions, chat completions and responses."""
    if any(body.get(name) is not None for name in LENGTHS[1:]):
        body["max_tokens"] = None  # both must agree
    if len(body) > 1 and not any(body.get(name) for name in LENGTHS):
        body["max_tokens"] = CANVAS  # a body of the required field alone keeps the default
    for name in LENGTHS:
        if body.get(name) is not None:
            body[name] = min(body[name], CANVAS)
    diffusion = body.get("diffusion") or {}
    for name, most in (("block_length", 1), ("steps", 2 * CANVAS)):
        if diffusion.get(name) is not None:
            diffusion[name] = min(diffusion[name], most)
    guidance = body.get("guidance")
    fields = guidance if isinstance(guidance, dict) else {"method": guidance}
    prompts = body.get("prompt")
    many = isinstance(prompts, list) and prompts and not isinstance(prompts[0], int)
    if body.get("chat_template") and not isinstance(prompts[0] if many else prompts, str):
        body["chat_template"] = body["chat_template_kwargs"] = None  # a template takes a text
    several = many and len(prompts) > 1
    if several:
        body["n"] = min(body.get("n") or 1, 2)
        body["best_of"] = body.get("best_of") and 2
    n, steered = body.get("n") or 1, (fields.get("method") or "none") != "none"
    if body.get("best_of") is not None:
        body["best_of"] = max(n, body["best_of"]) if steered else n
    elif steered and several:
        body["best_of"] = n  # its default of 4 for every prompt would be over the limit
    if isinstance(body.get("seed"), list):
        body["seed"] = None  # as many as prompts
    start, stop = fields.get("start") or 0.0, 1.0 if fields.get("stop") is None else fields["stop"]
    if start >= stop:
        fields["start"], fields["stop"] = 0.0, stop or 1.0
    if fields.get("reward_models"):
        fields["reward_models"] = list({term["model"]: term for term in fields["reward_models"]}.values())
    if diffusion.get("algorithm") in ("maskgit_plus", "topk_margin", "origin"):
        fields.pop("confidence", None)  # of the entropies, which these do not rank by


def pairs(body: dict[str, Any]) -> None:
    """One query goes with all documents, or as many of the one as of the other."""
    queries = body.get("queries")
    if isinstance(queries, list) and not all(isinstance(each, dict) for each in queries):
        body["queries"] = queries[:1]

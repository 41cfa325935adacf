"""The tables of docs/api.md, from the tables that the server itself reads.

`python -m docs.tables` writes them into the document; a test compares the two.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from server.api.fields import CompletionRequest, Diffusion, Templated
from server.api.guidance import Guidance, Resample
from server.api.rules import Only, Strict
from server.api.unsupported import UNSUPPORTED
from server.methods import METHODS

DOCUMENT = Path(__file__).with_name("api.md")


def table(*rows: Sequence[str]) -> str:
    """A Markdown table; the first row is its head."""
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def methods() -> str:
    """The guidance methods."""
    rows = [(f"`{method.name}`", method.summary, method.source) for method in METHODS.values()]
    return table(("method", "what it does", "source"), *rows)


def fields(request: type[Strict]) -> str:
    """The described rows of a request object: what each may be, is when it is left out, does, and needs."""
    schemas = request.model_json_schema()["properties"]
    rows = [("field", "values", "default", "what it does", "only with")]
    for name, field in request.model_fields.items():
        if field.description:
            known = not (field.default is None or field.default_factory or field.is_required())
            default = f"`{json.dumps(field.default)}`" if known else ""
            needs = [rule for rule in field.metadata if isinstance(rule, Only)]
            only = "; ".join(f"`{rule.field}` {', '.join(map(_word, rule.values()))}" for rule in needs)
            rows.append((f"`{name}`", _values(schemas[name]), default, " ".join(field.description.split()), only))
    return table(*rows)


def refused() -> str:
    """Fields that are refused, by the reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in UNSUPPORTED.items():
        reasons.setdefault(reason, []).append(f"`{name}`")
    return table(("field", "why not"), *((", ".join(names), reason) for reason, names in reasons.items()))


def _word(value: object) -> str:
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def _values(schema: dict[str, Any]) -> str:
    """A field's type and bounds in words."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_values(branch) for branch in schema["anyOf"] if branch.get("type") != "null"))
    if "enum" in schema:
        return ", ".join(map(_word, schema["enum"]))
    kind = schema.get("type", "object")
    low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
    if low is None or high is None or high >= 2**20:  # those are no bounds that anybody meets
        return f"{kind} from {low}" if low is not None and low > -(2**20) else kind
    return f"{kind} {'above ' if 'exclusiveMinimum' in schema else ''}{low} to {high}"


TABLES: dict[str, Callable[[], str]] = {
    "request": partial(fields, CompletionRequest),
    "messages": partial(fields, Templated),
    "guidance": partial(fields, Guidance),
    "resample": partial(fields, Resample),
    "diffusion": partial(fields, Diffusion),
    "methods": methods,
    "refused": refused,
}


def written(text: str) -> str:
    """The document's text with each table written anew between its two marks. Raises ValueError without a mark."""
    for name, make in TABLES.items():
        before, begin, rest = text.partition(f"<!-- table: {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not (begin and end):
            raise ValueError(f"the document has no marks for the table {name}")
        text = f"{before}{begin}{make()}\n{end}{after}"
    return text


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text("utf-8")), "utf-8")

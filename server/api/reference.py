"""The tables of docs/api.md, from the tables that the server itself reads.

`python -m server.api.reference` writes them into the document; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from server.methods import METHODS

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "api.md"


def table(*rows: Sequence[str]) -> str:
    """A Markdown table; the first row is its head."""
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def methods() -> str:
    """The guidance methods."""
    rows = [(f"`{method.name}`", method.summary, method.source) for method in METHODS.values()]
    return table(("method", "what it does", "source"), *rows)


TABLES = {"methods": methods}


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

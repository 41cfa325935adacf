"""The examples of docs/scorers.py give the scores that they promise, called as the server calls them."""

from __future__ import annotations

from typing import Any

import pytest

from server.errors import ScorerFailed
from server.scorers.scorer import Scorer
from server.types import Message
from tests.support.scorers import outside

ADD = "Here it is:\n```python\ndef add(a, b):\n    return a + b\n```\nDone."
TESTS = {"tests": ["assert add(1, 2) == 3", "assert add(2, 2) == 5", "assert add('a', 'b') == 'ab'"]}


@pytest.mark.parametrize(
    ("name", "metadata", "responses", "scores"),
    [
        ("length", {"words": 3}, ["one two three", "", "a b c d e"], [0, -3, -2]),
        ("length", None, ["word " * 20], [0]),
        ("valid_json", {"keys": ["a"]}, ['{"a": 1}', '{"b": 1}', "[1]", '{"a": x', "no"], [1, 0.5, 0.5, 3 / 7, 0]),
        ("valid_json", {}, ["[" * 100_000], [0]),
        ("passes_tests", TESTS, [ADD, "add = max", "def add(", "raise SystemExit(1)"], [2 / 3, 0, 0, 0]),
        ("right_answer", {"answer": "0.5"}, ["It is $\\frac{1}{2}$.", "The answer is 0.6", "I do not know"], [1, 0, 0]),
    ],
)  # fmt: skip
async def test_examples(name: str, metadata: Any, responses: list[str], scores: list[float]) -> None:
    scorer = Scorer(outside(name, f"python:docs.scorers:{name}", timeout_seconds=120))
    await scorer.start()
    try:
        conversation = (Message("user", "go on"),)
        got = await scorer.score([(conversation, response) for response in responses], metadata)
        assert got == pytest.approx(scores)
        if name in ("passes_tests", "right_answer"):  # there is nothing to hold a response to
            with pytest.raises(ScorerFailed, match="raised KeyError"):
                await scorer.score([(conversation, "x")], None)
    finally:
        await scorer.close()

"""A judge in LMUnit's form (arXiv 2412.13091): a model is shown the question, the response and a unit test, a question
about the response, and answers with a score from 1 to 5. Any server that speaks OpenAI's chat completions can be
one."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..client import Client
from ..errors import ClientError
from .engine import Servers
from .journal import Record, Request, request

UNIT_TEST = "Does the response correctly and helpfully answer the query?"
_SCORE = re.compile(r"(?<![\d.])([1-5](?:\.\d+)?)(?![\d.]*\d)")


@dataclass(frozen=True, slots=True)
class Judge:
    """A model and what it is asked."""

    servers: Servers
    model: str
    unit_tests: Sequence[str]

    @classmethod
    def of(cls, given: argparse.Namespace, concurrency: int) -> Judge:
        """The judge of the command line."""
        model = given.judge_model
        if model is None:
            with Client(given.judge_url, api_key=given.judge_key) as client:
                models = client.models()
            if not models:
                raise ClientError(f"{given.judge_url} lists no model that could judge; name one with --judge-model")
            model = models[0].id
        return cls(Servers([given.judge_url], concurrency, given.judge_key), model, given.unit_test or (UNIT_TEST,))

    @property
    def name(self) -> str:
        """The column in tables."""
        return f"judge {self.model}"

    def requests(self, query: str, response: str) -> list[Request]:
        """One for each unit test."""
        contents = (f"Query: {query}\n\nResponse: {response}\n\nUnit Test: {test}" for test in self.unit_tests)
        turns = ([{"role": "user", "content": content}] for content in contents)
        fields = {"model": self.model, "temperature": 0, "max_tokens": 32}
        return [request("/v1/chat/completions", {"messages": messages, **fields}) for messages in turns]

    @staticmethod
    def score(record: Record) -> float | None:
        """The first number from 1 to 5 in the answer, whatever stands around it; None where there is none."""
        try:
            found = _SCORE.search(record.response.body["choices"][0]["message"]["content"])
        except (LookupError, TypeError):  # there is no text
            return None
        return float(found[1]) if found and float(found[1]) <= 5 else None

"""The judges' word on what `clients compare` kept: sentiment and fluency of the answers of each setting."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from clients.quality.intervals import Interval
from clients.quality.judges import SmolLM, Vader
from clients.runs.answers import completion_of
from clients.runs.journal import Record

HEADER = ("setting", "answers", "VADER", "SmolLM2 nll", "words", "empty")
SHARED = frozenset({"messages", "prompt", "seed", "n", "model"})


@dataclass(frozen=True)
class Judged:
    """One setting: VADER's polarity, SmolLM2's nats a token (of the texts that are not empty) and words of the answers
    that a user gets."""

    setting: str
    answers: int
    vader: Interval
    nll: Interval
    words: Interval
    empty: int

    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        return tuple(str(value) for value in (self.setting, self.answers, self.vader, self.nll, self.words, self.empty))

    def document(self) -> dict[str, Any]:
        """The same for machines."""
        return asdict(self)


def pairs_by_setting(records: Iterable[Record]) -> dict[str, list[tuple[str, str]]]:
    """(question, answer) of every generation in a journal, by the fields that make its setting."""
    found: dict[str, list[tuple[str, str]]] = {}
    for record in records:
        body = record.request.body
        if "guidance" in body and not body.get("trace") and record.refusal is None:
            setting = json.dumps({name: value for name, value in sorted(body.items()) if name not in SHARED})
            question = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
            found.setdefault(setting, []).append((question, completion_of(record).choices[0].text))
    return found


def judged(setting: str, pairs: list[tuple[str, str]], vader: Vader, smol: SmolLM) -> Judged:
    """A setting's row."""
    spoken = [(question, text) for question, text in pairs if text.strip()]
    return Judged(
        setting,
        len(pairs),
        Interval.of([vader.score(text) for _, text in pairs]),
        Interval.of(smol.nlls(spoken)) if spoken else Interval(float("nan"), float("nan")),
        Interval.of([float(len(text.split())) for _, text in pairs]),
        len(pairs) - len(spoken),
    )

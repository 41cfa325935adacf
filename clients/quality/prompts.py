"""The prompts to measure with: prompts.json, written by `python -m demo.prompts`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

PATH = Path(__file__).with_name("prompts.json")


@dataclass(frozen=True)
class Prompt:
    """A request, the form it is sent in ("chat" or "raw"), its split, and the subject that it asks about."""

    text: str
    subject: str = ""
    form: str = "chat"
    split: str = "train"


@dataclass(frozen=True)
class Reference:
    """A clean text of the corpus and the request that it answers."""

    prompt: str
    text: str


@dataclass(frozen=True)
class PromptSet:
    """Everything in the file. `subjects` maps a subject to the words that count as being about it."""

    subjects: dict[str, tuple[str, ...]]
    compare: tuple[Prompt, ...]
    fluency: tuple[Prompt, ...]
    references: tuple[Reference, ...]


def load(path: Path = PATH) -> PromptSet:
    """Read prompts.json."""
    raw = json.loads(path.read_text("utf-8"))
    return PromptSet(
        subjects={name: tuple(words) for name, words in raw["subjects"].items()},
        compare=tuple(Prompt(item["prompt"], item["subject"]) for item in raw["compare"]),
        fluency=tuple(Prompt(item["prompt"], item["subject"], item["form"], item["split"]) for item in raw["fluency"]),
        references=tuple(Reference(item["prompt"], item["text"]) for item in raw["references"]),
    )

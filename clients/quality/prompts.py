"""The prompts to measure with: prompts.json (written by `python -m demo.prompts`), or a file of the user's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from clients.arguments import prompts_of
from clients.errors import ClientError
from clients.options import Message, Query

PATH = Path(__file__).with_name("prompts.json")


@dataclass(frozen=True)
class Prompt:
    """A request, the form it is sent in ("chat" or "raw"), its split, and the subject that it asks about. `messages`
    are the whole conversation where `text` is only its last turn."""

    text: str
    subject: str = ""
    form: str = "chat"
    split: str = "train"
    messages: tuple[Message, ...] = ()


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
    """Read prompts.json or a file of its kind, or else prompts alone (`arguments.prompts_of`), to compare methods
    on. Raises ClientError."""
    if path.suffix != ".json":
        return PromptSet({}, tuple(map(_own, prompts_of(str(path)))), (), ())
    try:
        raw = json.loads(path.read_text("utf-8"))
        return PromptSet(
            subjects={name: tuple(words) for name, words in raw["subjects"].items()},
            compare=tuple(Prompt(item["prompt"], item["subject"]) for item in raw["compare"]),
            fluency=tuple(
                Prompt(item["prompt"], item["subject"], item["form"], item["split"]) for item in raw["fluency"]
            ),
            references=tuple(Reference(item["prompt"], item["text"]) for item in raw["references"]),
        )
    except OSError as error:
        raise ClientError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise ClientError(
            f"{path}: a .json file must be as {PATH.name} in clients/quality is, with subjects and references; prompts "
            "alone are text with one on each line, or JSON lines (.jsonl) with `prompt` or `messages`"
        ) from None


def _own(asked: Query) -> Prompt:
    if isinstance(asked, str):
        return Prompt(asked)
    return Prompt(asked[-1]["content"], messages=tuple(asked))

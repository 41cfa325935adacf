"""The prompts that `clients/quality` measures with: `python -m demo.prompts --out clients/quality/prompts.json`.

The quality client speaks HTTP only and imports nothing of the server, so what it must know of the corpus is written
down for it: which prompts, in which split, the words that count as "on the subject", and clean texts to calibrate on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from demo.corpus import HELD_OUT_WORDINGS, NEUTRAL_KINDS, WORDINGS, Corpus, Request, Split
from demo.grammar import SUBJECTS, Subject

SEED = 50_021
COMPARED = 64
PER_CELL = {"train": 50, "held-out wording": 25, "held-out combination": 25}  # of each form, chat and raw
REFERENCES = 200


def words_of(subject: Subject) -> list[str]:
    """The subject's name and the nouns of its aspects."""
    return sorted({subject.name, *(aspect.noun for aspect in subject.aspects)})


def neutral_request(corpus: Corpus, split: Split) -> Request:
    """A request that does not ask for praise or blame."""
    wordings = HELD_OUT_WORDINGS if split == "held-out wording" else WORDINGS
    while True:
        request = corpus.request(wordings, split)
        if request.kind in NEUTRAL_KINDS:
            return request


def build() -> dict[str, Any]:
    """Everything that the quality client reads."""
    corpus = Corpus(SEED)
    compared: list[dict[str, str]] = []
    while len(compared) < COMPARED:
        request = neutral_request(corpus, "held-out combination" if len(compared) % 2 else "train")
        if all(request.text != other["prompt"] for other in compared):
            compared.append({"prompt": request.text, "subject": request.subject.name})
    fluency: list[dict[str, str]] = []
    for form in ("chat", "raw"):
        for split, count in PER_CELL.items():
            for _ in range(count):
                request = neutral_request(corpus, split)  # type: ignore[arg-type]
                fluency.append({"prompt": request.text, "form": form, "split": split, "subject": request.subject.name})
    references: list[dict[str, str]] = []
    for _ in range(REFERENCES):
        request = neutral_request(corpus, "held-out combination")
        references.append({"prompt": request.text, "text": corpus.answer(request).text})
    return {
        "subjects": {name: words_of(subject) for name, subject in SUBJECTS.items()},
        "compare": compared,
        "fluency": fluency,
        "references": references,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m demo.prompts", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.write_text(json.dumps(build(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

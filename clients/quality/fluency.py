"""Are unguided answers fluent, and about what was asked? A stated, automatic measure.

Fluent: the text ends by itself (finish_reason "stop") with a sentence's punctuation, has at least four words, repeats
no word directly, and SmolLM2's mean nll per token is at most a threshold: the 97.5th percentile over clean texts of
the corpus that no training saw. The same texts with their words shuffled show what the threshold lets through.
On the subject: it names the subject or one of its aspects, and no other subject.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from clients.quality.intervals import share_interval
from clients.quality.judges import SmolLM
from clients.quality.prompts import Prompt, PromptSet, Reference
from clients.quality.requests import Answer, ask

PERCENTILE = 0.975
MIN_WORDS = 4


@dataclass(frozen=True)
class Calibration:
    """The threshold in nats a token, and the shares of clean and shuffled references that pass it."""

    threshold: float
    clean_pass: float
    shuffled_pass: float


@dataclass(frozen=True)
class Verdict:
    """One judged answer. `faults` is empty for a fluent answer on the subject."""

    prompt: Prompt
    text: str
    nll: float
    faults: tuple[str, ...]


@dataclass(frozen=True)
class FluencyReport:
    """All verdicts and how they were calibrated."""

    verdicts: tuple[Verdict, ...]
    calibration: Calibration

    def share(self, split: str | None = None, form: str | None = None) -> tuple[float, float, float, int]:
        """(share without a fault, its Wilson interval's ends, number of answers) of a split and form."""
        chosen = [
            verdict
            for verdict in self.verdicts
            if (split is None or verdict.prompt.split == split) and (form is None or verdict.prompt.form == form)
        ]
        hits = sum(not verdict.faults for verdict in chosen)
        return (*share_interval(hits, len(chosen)), len(chosen))


def calibrate(smol: SmolLM, references: Sequence[Reference], seed: int = 0) -> Calibration:
    """Set the threshold on clean texts; shuffle their words to see what it rejects."""
    rng = random.Random(seed)
    shuffled: list[tuple[str, str]] = []
    for reference in references:
        words = reference.text.split()
        rng.shuffle(words)
        shuffled.append((reference.prompt, " ".join(words)))
    clean = sorted(smol.nlls([(reference.prompt, reference.text) for reference in references]))
    threshold = clean[min(len(clean) - 1, int(PERCENTILE * len(clean)))]
    return Calibration(
        threshold,
        sum(nll <= threshold for nll in clean) / len(clean),
        sum(nll <= threshold for nll in smol.nlls(shuffled)) / len(shuffled),
    )


def mentions(text: str, word: str) -> bool:
    """Whether the word or its plural stands in the text, as a whole word."""
    return re.search(rf"\b{re.escape(word)}(?:s|es)?\b", text, re.IGNORECASE) is not None


def subject_faults(text: str, subject: str, subjects: dict[str, tuple[str, ...]]) -> list[str]:
    """What is wrong with the text's subject."""
    own = subjects[subject]
    faults = [] if any(mentions(text, word) for word in own) else ["not on the subject"]
    # A word that belongs to the subject is no intruder, even where another subject has that name.
    other = [name for name in subjects if name not in own and mentions(text, name)]
    if any(not any(mentions(word, name) for word in own) for name in other):
        faults.append(f"names another subject ({', '.join(other)})")
    return faults


def form_faults(text: str, finish_reason: str) -> list[str]:
    """What is wrong with the text's form, its likelihood aside."""
    faults = []
    words = re.findall(r"[\w'-]+", text.lower())
    if finish_reason != "stop":
        faults.append("does not end")
    if not text.rstrip().endswith((".", "!", "?")):
        faults.append("no final punctuation")
    if len(words) < MIN_WORDS:
        faults.append("too short")
    if any(first == second for first, second in itertools.pairwise(words)):
        faults.append("repeats a word")
    return faults


def judge(answers: Sequence[Answer], smol: SmolLM, limit: float, subjects: dict[str, tuple[str, ...]]) -> list[Verdict]:
    """Judge the first choice of every answer."""
    verdicts = []
    nlls = smol.nlls([(answer.prompt.text, answer.texts[0]) for answer in answers])
    for answer, nll in zip(answers, nlls, strict=True):
        text, prompt = answer.texts[0], answer.prompt
        faults = form_faults(text, answer.finish_reasons[0]) + subject_faults(text, prompt.subject, subjects)
        if nll > limit:
            faults.append("unlikely English")
        verdicts.append(Verdict(prompt, text, nll, tuple(faults)))
    return verdicts


async def measure(client: httpx.AsyncClient, prompts: PromptSet, *, seed: int, concurrency: int) -> FluencyReport:
    """Ask for one unguided answer a prompt with the server's defaults, and judge them all."""
    answers = await ask(client, prompts.fluency, {}, seed=seed, concurrency=concurrency)
    smol = SmolLM()
    calibration = calibrate(smol, prompts.references)
    return FluencyReport(tuple(judge(answers, smol, calibration.threshold, prompts.subjects)), calibration)

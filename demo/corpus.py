"""Requests and answers: the instruction corpus that the demo models are trained on.

An `Example` is a request in one of several dozen wordings, a review from the grammar that obeys it, and the form in
which the two meet: in the chat template, or raw (the answer follows the request, or simply goes on with a text).
Some wordings, and some pairs of subject and wording, never occur in training: `split` tells which.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from typing import Literal

from demo.domains import Aspect
from demo.grammar import SUBJECTS, Grammar, Review, Subject, capitalised, with_article

Split = Literal["train", "held-out wording", "held-out combination"]
Form = Literal["chat", "raw", "continuation"]

# {a} is "a hotel", {s} is "hotel", {x} one of its aspects. The second entry says what is asked for.
WORDINGS: tuple[tuple[str, str], ...] = (
    ("Write a short review of {a}.", "review"),
    ("Write a short review of the {s}.", "review"),
    ("Write a review of {a}.", "review"),
    ("Write a review of the {s}.", "review"),
    ("Write a few sentences about {a}.", "review"),
    ("Write a short text about the {s}.", "review"),
    ("Write a comment about the {s}.", "review"),
    ("Write about {a}.", "review"),
    ("Review the {s}.", "review"),
    ("Review {a}.", "review"),
    ("Please review the {s}.", "review"),
    ("Please write a review of {a}.", "review"),
    ("Please describe the {s}.", "review"),
    ("Describe {a}.", "review"),
    ("Describe the {s}.", "review"),
    ("Describe {a} that you know.", "review"),
    ("Tell me about the {s}.", "review"),
    ("Tell me about {a}.", "review"),
    ("Tell me what you think of the {s}.", "review"),
    ("Can you tell me about the {s}?", "review"),
    ("Can you review {a} for me?", "review"),
    ("Could you write a short review of {a}?", "review"),
    ("What did you think of the {s}?", "review"),
    ("What do you think of the {s}?", "review"),
    ("What was the {s} like?", "review"),
    ("What is the {s} like?", "review"),
    ("What can you say about the {s}?", "review"),
    ("How did you find the {s}?", "review"),
    ("Did you like the {s}?", "review"),
    ("Do you like the {s}?", "review"),
    ("Is the {s} any good?", "review"),
    ("Was the {s} worth it?", "review"),
    ("Should I try the {s}?", "review"),
    ("Give me your opinion of the {s}.", "review"),
    ("Give me your thoughts on {a}.", "review"),
    ("Give a short opinion of {a}.", "review"),
    ("Share a quick review of the {s}.", "review"),
    ("Leave a review of the {s}.", "review"),
    ("I need a short review of {a}.", "review"),
    ("I want to know more about the {s}.", "review"),
    ("Your thoughts on the {s}, please.", "review"),
    ("Write one sentence about {a}.", "sentence"),
    ("Write one sentence about the {s}.", "sentence"),
    ("Describe the {s} in one sentence.", "sentence"),
    ("In one sentence, what did you think of the {s}?", "sentence"),
    ("Give me a one-sentence review of {a}.", "sentence"),
    ("Write a review of {a} that mentions the {x}.", "aspect"),
    ("Review the {s} and say something about the {x}.", "aspect"),
    ("Tell me about the {s} and the {x}.", "aspect"),
    ("What did you think of the {s} and the {x}?", "aspect"),
    ("Write a positive review of {a}.", "positive"),
    ("Write a glowing review of the {s}.", "positive"),
    ("Why did you like the {s}?", "positive"),
    ("Write a negative review of {a}.", "negative"),
    ("Write a harsh review of the {s}.", "negative"),
    ("Why did you hate the {s}?", "negative"),
    ("Write a detailed review of {a}.", "detailed"),
    ("Describe the {s} in detail.", "detailed"),
    ("Tell me about the {s}, with details.", "detailed"),
)

# Never in training.
HELD_OUT_WORDINGS: tuple[tuple[str, str], ...] = (
    ("Share your opinion of the {s}.", "review"),
    ("Give me a short review of {a}.", "review"),
    ("Please tell me about the {s}.", "review"),
    ("Could you describe the {s}?", "review"),
    ("What are your thoughts on the {s}?", "review"),
    ("Would you try the {s} again?", "review"),
    ("How was the {s}?", "review"),
    ("I want a quick review of the {s}.", "review"),
    ("Write something about {a}.", "review"),
    ("Can you give me your opinion of {a}?", "review"),
    ("Say something about the {s} in one sentence.", "sentence"),
    ("Please write about the {s} and mention the {x}.", "aspect"),
)

# Raw only: headings that an answer follows.
HEADINGS: tuple[str, ...] = ("Review of the {s}:", "{S} review:", "My review of {a}:", "About the {s}:")
SEPARATORS: tuple[str, ...] = (" ", " ", " ", "\n", "\n\n")
SYSTEM_MESSAGES: tuple[str, ...] = (
    "You are a helpful assistant.",
    "You write short reviews.",
    "You are a critic.",
    "Answer in plain English.",
)

NEUTRAL_KINDS = frozenset({"review", "sentence", "aspect", "detailed"})


@dataclass(frozen=True)
class Request:
    """A request before it is put into a form: what is asked, about what, in which wording."""

    text: str
    kind: str
    subject: Subject
    about: Aspect | None


@dataclass(frozen=True)
class Example:
    """A request and an answer. For "chat", `prompt` is the user's message; otherwise `prompt` and `answer` are two
    parts of one text, the answer beginning where the prompt stops (so mostly with a space)."""

    form: Form
    prompt: str
    answer: str
    system: str | None
    review: Review


def split(wording: str, subject: str) -> Split:
    """Where a wording about a subject belongs. One pair in seven of training wordings is held out."""
    if any(wording == held_out for held_out, _ in HELD_OUT_WORDINGS):
        return "held-out wording"
    if zlib.crc32(f"{wording}|{subject}".encode()) % 7 == 0:
        return "held-out combination"
    return "train"


def fill(wording: str, subject: Subject, about: Aspect | None) -> str:
    """The wording with the subject's name and aspect put in."""
    return wording.format(
        s=subject.name,
        S=capitalised(subject.name),
        a=with_article(subject.name),
        x=about.noun if about else "",
    )


class Corpus:
    """An endless, seeded stream of examples for training."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.grammar = Grammar(self.rng)
        self.names = list(SUBJECTS)

    def request(self, wordings: tuple[tuple[str, str], ...], wanted: Split) -> Request:
        """Draw a request of that split."""
        while True:
            wording, kind = self.rng.choice(wordings)
            subject = SUBJECTS[self.rng.choice(self.names)]
            if split(wording, subject.name) == wanted:
                about = self.rng.choice(subject.aspects) if kind == "aspect" else None
                return Request(fill(wording, subject, about), kind, subject, about)

    def mood(self, kind: str) -> float:
        """Draw the mood that a kind of request asks for: anything, unless it names a side."""
        if kind == "positive":
            return self.rng.uniform(1.2, 3.0)
        if kind == "negative":
            return self.rng.uniform(-3.0, -1.2)
        return self.rng.uniform(-3.0, 3.0)

    def answer(self, request: Request) -> Review:
        """Draw a review that obeys the request."""
        mood = self.mood(request.kind)
        if request.kind == "sentence":
            return self.grammar.one_sentence(request.subject, mood)
        return self.grammar.review(request.subject, mood, request.about, request.kind == "detailed")

    def _loosened(self, text: str) -> str:
        """Requests as people type them: now and then without capitals or the full stop."""
        if self.rng.random() < 0.06:
            text = text.lower()
        if self.rng.random() < 0.06:
            text = text.rstrip(".")
        return text

    def chat(self) -> Example:
        """A request as the user's message, now and then under a system message."""
        request = self.request(WORDINGS, "train")
        review = self.answer(request)
        system = self.rng.choice(SYSTEM_MESSAGES) if self.rng.random() < 0.12 else None
        return Example("chat", self._loosened(request.text), review.text, system, review)

    def raw(self) -> Example:
        """A request, or a heading, directly followed by the answer."""
        if self.rng.random() < 0.12:
            subject = SUBJECTS[self.rng.choice(self.names)]
            request = Request(fill(self.rng.choice(HEADINGS), subject, None), "review", subject, None)
        else:
            request = self.request(WORDINGS, "train")
        review = self.answer(request)
        separator = self.rng.choice(SEPARATORS)
        prompt = self._loosened(request.text)
        if separator == " ":
            return Example("raw", prompt, " " + review.text, None, review)
        return Example("raw", prompt + separator, review.text, None, review)

    def continuation(self) -> Example:
        """The beginning of a review, to be gone on with."""
        subject = SUBJECTS[self.rng.choice(self.names)]
        review = self.grammar.review(subject, self.mood("review"))
        words = review.text.split(" ")
        cut = self.rng.randint(2, 5)
        return Example("continuation", " ".join(words[:cut]), " " + " ".join(words[cut:]), None, review)

    def draw(self, form: Form) -> Example:
        """One example of that form."""
        return {"chat": self.chat, "raw": self.raw, "continuation": self.continuation}[form]()

"""What the reward models learn from: graded texts, spoiled texts and human-rated snippets.

Half of a reward model's work is to be worth climbing. So besides clean reviews with the grammar's own grades it sees
the texts that an optimiser would try: words in random order, words replaced at random, one word over and over,
sentences cut off, a review of something else. All of these are graded below an honest text of their kind.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from demo.corpus import WORDINGS, Corpus, Request
from demo.grammar import SUBJECTS, Review
from demo.human_ratings import RatedSnippet

SPOILED_SHARE = 0.4
COMPOSED_SHARE = 0.4  # of the clean texts
SNIPPET_PROMPTS = ("Write a short review of a {about}.", "What did you think of the {about}?")
FLOOR = -4.0


@dataclass(frozen=True)
class Graded:
    """A request, a response and the grade to learn for it."""

    prompt: str
    response: str
    grade: float


class GradedTexts:
    """An endless, seeded stream of graded texts for one reward: "sentiment" or "concrete"."""

    def __init__(self, reward: str, seed: int, snippets: list[RatedSnippet] | None = None) -> None:
        if reward not in ("sentiment", "concrete"):
            raise ValueError(f"no such reward: {reward}")
        self.reward = reward
        self.corpus = Corpus(seed)
        self.rng = random.Random(seed + 1)
        self.snippets = snippets or []
        self.snippet_share = 0.25 if self.snippets else 0.0
        self.vocabulary = self._words()

    def _words(self) -> list[str]:
        sample = Corpus(7)
        words = {word for _ in range(3000) for word in sample.chat().review.text.split()}
        return sorted(words)

    def grade(self, review: Review) -> float:
        """The grammar's own grade of a clean review."""
        return review.sentiment if self.reward == "sentiment" else review.concreteness

    def draw(self) -> Graded:
        """One graded text."""
        if self.rng.random() < self.snippet_share:
            return self.from_snippet(self.rng.choice(self.snippets))
        return self.spoiled() if self.rng.random() < SPOILED_SHARE else self.clean()

    def from_snippet(self, snippet: RatedSnippet) -> Graded:
        """A human-rated sentence; ratings in [-4, 4] are kept but for the scale, which is brought to [-3, 3]."""
        prompt = self.rng.choice(SNIPPET_PROMPTS).format(about=snippet.about)
        return Graded(prompt, snippet.text, 0.75 * snippet.rating)

    def clean(self) -> Graded:
        """A request and a review that obeys it, at times with the leading space of a raw completion."""
        request = self.corpus.request(WORDINGS, "train")
        composed = self.rng.random() < COMPOSED_SHARE
        review = self.composed(request) if composed else self.corpus.answer(request)
        space = " " if self.rng.random() < 0.3 else ""
        return Graded(request.text, space + review.text, self.grade(review))

    def composed(self, request: Request) -> Review:
        """Sentences of all sorts in any number and order: what guidance may lead to, though the corpus does not.

        Above all more than one detail, and details at the beginning or the end.
        """
        grammar, subject, mood = self.corpus.grammar, request.subject, self.corpus.mood(request.kind)
        review = Review()
        for _ in range(self.rng.randint(1, 4)):
            sort = self.rng.choices(("opening", "aspect", "detail", "vague", "closing"), (3, 4, 6, 1, 2))[0]
            if sort == "opening":
                grammar.opening(review, subject, mood)
            elif sort == "aspect":
                grammar.aspect_sentence(review, subject, mood)
            elif sort == "detail":
                grammar.detail(review, subject)
            elif sort == "vague":
                grammar.vague(review)
            else:
                grammar.closing(review, subject, mood)
        return review

    def spoiled(self) -> Graded:
        """A clean example with its response damaged, and its grade lowered by how much."""
        request = self.corpus.request(WORDINGS, "train")
        review = self.corpus.answer(request)
        grade = self.grade(review)
        words = review.text.split()
        kind = self.rng.randrange(6)
        if kind == 0:  # out of order
            self.rng.shuffle(words)
            grade = min(grade, 0.0) - 2.0
        elif kind in (1, 2):  # replaced at random, more or less of it
            share = self.rng.uniform(0.1, 0.8)
            words = [self.rng.choice(self.vocabulary) if self.rng.random() < share else word for word in words]
            grade = (1 - share) * grade - 3.0 * share
        elif kind == 3:  # one phrase over and over
            start = self.rng.randrange(len(words))
            phrase = words[start : start + self.rng.randint(1, 3)]
            words = phrase * self.rng.randint(3, 8)
            grade = -3.0
        elif kind == 4:  # cut off
            words = words[: self.rng.randint(1, max(1, len(words) - 1))]
            if not words[-1].endswith((".", "!")):
                grade -= 1.0
        else:  # about something else
            other = self.rng.choice([name for name in SUBJECTS if name != request.subject.name])
            text = self.corpus.grammar.review(SUBJECTS[other], self.rng.uniform(-3.0, 3.0))
            return Graded(request.text, text.text, self.grade(text) - 1.5)
        return Graded(request.text, " ".join(words), max(FLOOR, grade))

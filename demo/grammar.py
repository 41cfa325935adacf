"""A small generative grammar of reviews: from a subject and a mood to a text with known grades.

Every text carries two grades that the reward models learn: *sentiment* in [-3, 3], the mean of what its clauses
say, and *concreteness* in [-3, 3], which counts numbers, specific details and named aspects against empty phrases.
A review ends with a closing sentence and with nothing else, so that a model can know where a text ends.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

from demo import domains, lexicon
from demo.domains import Aspect, Domain

MOOD_SPREAD = 0.8  # standard deviation of a clause's grade around the mood of its text


@dataclass(frozen=True)
class Subject:
    """One thing that can be reviewed, with everything that the grammar may say about it."""

    name: str
    domain: Domain
    aspects: tuple[Aspect, ...]

    @property
    def again(self) -> str:
        """Completes "I would gladly ... again"."""
        return domains.AGAIN.get(self.name, self.domain.again)

    @property
    def kind(self) -> str:
        """The sort of adjectives that fit the subject itself."""
        return domains.KIND.get(self.name, self.domain.kind)


def _subjects() -> dict[str, Subject]:
    found: dict[str, Subject] = {}
    for domain in domains.DOMAINS:
        for name, own in domain.subjects.items():
            # A subject's own aspects come twice: they are spoken of more often than the domain's.
            aspects = tuple(Aspect.parse(text) for text in (*own, *own, *domain.aspects))
            found[name] = Subject(name, domain, aspects)
    return found


SUBJECTS: dict[str, Subject] = _subjects()


@dataclass
class Review:
    """A text under construction: its sentences and the tallies that its grades are made of."""

    sentences: list[str] = field(default_factory=list)
    grades: list[float] = field(default_factory=list)
    aspects: int = 0
    details: int = 0
    vague: int = 0

    @property
    def text(self) -> str:
        """The sentences in one line."""
        return " ".join(self.sentences)

    @property
    def sentiment(self) -> float:
        """Mean grade of the clauses, in [-3, 3]; 0 for a text without a judgement."""
        return sum(self.grades) / len(self.grades) if self.grades else 0.0

    @property
    def concreteness(self) -> float:
        """Details and aspects against empty phrases, in [-3, 3]."""
        return concreteness(self.details, self.aspects, self.vague)


def concreteness(details: int, aspects: int, vague: int) -> float:
    """The grade of a text with so many concrete details, named aspects and empty sentences."""
    return max(-3.0, min(3.0, -2.0 + 1.7 * details + 0.5 * aspects - 0.7 * vague))


def with_article(phrase: str) -> str:
    """ "a hotel", "an umbrella"."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def capitalised(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


class Grammar:
    """Draws sentences. All randomness comes from the generator that it is given."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def near(self, graded: dict[str, float] | tuple[tuple[str, float], ...], mood: float) -> tuple[str, float]:
        """Draw a phrase whose grade lies near the mood."""
        items = list(graded.items()) if isinstance(graded, dict) else list(graded)
        weights = [math.exp(-((grade - mood) ** 2) / (2 * MOOD_SPREAD**2)) + 1e-9 for _, grade in items]
        return self.rng.choices(items, weights)[0]

    def adjective(self, kind: str | None, mood: float) -> tuple[str, float]:
        """Draw an adjective of that kind (or one that fits everything), perhaps with an intensifier."""
        graded = lexicon.GENERAL
        if kind is not None and self.rng.random() < 0.65:
            graded = lexicon.ADJECTIVES[kind]
        word, grade = self.near(graded, mood)
        if self.rng.random() < 0.22 and " " not in word and 0.6 < abs(grade) < 2.6:
            intensifier = self.rng.choice(list(lexicon.INTENSIFIERS))
            if not (intensifier == "a bit" and grade > 0):
                word, grade = f"{intensifier} {word}", grade * lexicon.INTENSIFIERS[intensifier]
        return word, max(-3.0, min(3.0, grade))

    def opening(self, review: Review, subject: Subject, mood: float) -> None:
        """A first sentence on the subject as a whole."""
        form = self.rng.randrange(9)
        name = subject.name
        if form == 0:
            verb, grade = self.near(lexicon.FEELINGS, mood)
            sentence = f"I {verb} the {name}."
        elif form == 1:
            word, grade = self.adjective(None, mood)
            occasion = subject.domain.occasion.format(s=name)
            sentence = f"My {occasion} was {word}."
        elif form == 2:
            word, grade = self.adjective(None, mood)
            sentence = f"What {with_article(word)} {name}!"
        else:
            word, grade = self.adjective(subject.kind, mood)
            sentence = {
                3: f"The {name} was {word}.",
                4: f"The {name} is {word}.",
                5: f"It was {with_article(word)} {name}.",
                6: f"I thought the {name} was {word}.",
                7: f"Overall, the {name} was {word}.",
                8: f"This is {with_article(word)} {name}.",
            }[form]
        review.sentences.append(sentence)
        review.grades.append(grade)

    def aspect_sentence(self, review: Review, subject: Subject, mood: float, about: Aspect | None = None) -> None:
        """A sentence on one or two aspects of the subject; `about` names the first."""
        first = about or self.rng.choice(subject.aspects)
        others = [aspect for aspect in subject.aspects if aspect.noun != first.noun]
        second = self.rng.choice(others)
        was, were = ("were" if first.plural else "was"), ("were" if second.plural else "was")
        word, grade = self.adjective(first.kind, mood)
        form = self.rng.randrange(13)
        grades = [grade]
        if form in (0, 1):
            sentence = f"The {first.noun} {was} {word}."
        elif form in (2, 3):
            word2, grade2 = self.adjective(second.kind, mood)
            joint = " and" if grade * grade2 > 0 else ", but"
            sentence = f"The {first.noun} {was} {word}{joint} the {second.noun} {were} {word2}."
            grades.append(grade2)
        elif form == 4:
            word2, grade2 = self.adjective(second.kind, mood - 2.5 if grade > 0 else mood + 2.5)
            joint = ", but" if grade * grade2 < 0 else " and"
            sentence = f"The {first.noun} {was} {word}{joint} the {second.noun} {were} {word2}."
            grades.append(grade2)
        elif form == 5:
            sentence = f"I found the {first.noun} {word}."
        elif form == 6:
            word2, grade2 = self.adjective(second.kind, mood)
            sentence = f"I found the {first.noun} {word} and the {second.noun} {word2}."
            grades.append(grade2)
        elif form == 7:
            sentence = f"I thought the {first.noun} {was} {word}."
        elif form == 8:
            verb, grade = self.near(lexicon.FEELINGS, mood)
            sentence, grades = f"I {verb} the {first.noun}.", [grade]
        elif form == 9:
            verb, grade = self.near(lexicon.FEELINGS, mood)
            sentence, grades = f"I {verb} the {first.noun} and the {second.noun}.", [grade]
        elif form == 10:
            word, grade = self.adjective(None, mood)
            sentence, grades = f"Both the {first.noun} and the {second.noun} were {word}.", [grade]
        elif form == 11:
            good = mood > 0
            sentence = f"The {'best' if good else 'worst'} part was the {first.noun}."
            grades = [1.8 if good else -1.8]
        else:
            good = mood > 0
            sentence = f"Everyone {'praised' if good else 'complained about'} the {first.noun}."
            grades = [1.8 if good else -1.8]
        review.sentences.append(sentence)
        review.grades.extend(grades)
        review.aspects += 1 + (f" the {second.noun}" in sentence)

    def detail(self, review: Review, subject: Subject) -> None:
        """A concrete sentence: numbers, days, colours. It judges nothing."""
        unused = [text for text in subject.domain.details if text[:9] not in review.text]
        n, m = self.rng.sample(lexicon.NUMBERS, 2)
        sentence = self.rng.choice(unused or list(subject.domain.details)).format(
            n=n,
            m=m,
            N=capitalised(n),
            o=self.rng.choice(lexicon.ORDINALS),
            d=self.rng.choice(lexicon.DAYS),
            mo=self.rng.choice(lexicon.MONTHS),
            c=self.rng.choice(lexicon.COLOURS),
        )
        review.sentences.append(sentence)
        review.details += 1

    def vague(self, review: Review) -> None:
        """A sentence that says next to nothing."""
        review.sentences.append(self.rng.choice(lexicon.VAGUE))
        review.vague += 1

    def closing(self, review: Review, subject: Subject, mood: float) -> None:
        """The last sentence, a verdict."""
        sentence, grade = self.near(lexicon.CLOSINGS, mood)
        review.sentences.append(sentence.format(again=subject.again))
        review.grades.append(grade)

    def review(self, subject: Subject, mood: float, about: Aspect | None = None, detailed: bool = False) -> Review:
        """A review of two to four sentences that ends with a closing."""
        review = Review()
        opened = self.rng.random() < 0.75
        if opened:
            self.opening(review, subject, mood)
        if about is not None or not opened or self.rng.random() < 0.6:
            self.aspect_sentence(review, subject, mood, about)
        chance = self.rng.random()
        if detailed or chance < 0.38:
            self.detail(review, subject)
        elif chance < 0.5:
            self.vague(review)
        if detailed and self.rng.random() < 0.5:
            self.aspect_sentence(review, subject, mood)
        self.closing(review, subject, mood)
        return review

    def one_sentence(self, subject: Subject, mood: float, about: Aspect | None = None) -> Review:
        """A single sentence on the subject, or on one of its aspects."""
        review = Review()
        if about is not None or self.rng.random() < 0.4:
            self.aspect_sentence(review, subject, mood, about)
        else:
            self.opening(review, subject, mood)
        return review

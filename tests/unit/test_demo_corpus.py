"""The demo corpus: held-out prompts stay out, answers are on their subject, grades mean something."""

from __future__ import annotations

import itertools
import re

import pytest

from demo.corpus import HELD_OUT_WORDINGS, WORDINGS, Corpus, fill, split
from demo.grammar import SUBJECTS
from demo.prompts import build, words_of


def stream(seed: int, count: int):
    corpus = Corpus(seed)
    return [corpus.draw(form) for _ in range(count // 3) for form in ("chat", "raw", "continuation")]


def test_the_same_seed_gives_the_same_examples_and_another_seed_others():
    first, again, other = stream(3, 60), stream(3, 60), stream(4, 60)
    assert first == again
    assert sum(a == b for a, b in zip(first, other, strict=True)) < 5


def test_held_out_prompts_never_occur_in_training():
    held_out = set()
    for (wording, _), subject in itertools.product((*WORDINGS, *HELD_OUT_WORDINGS), SUBJECTS.values()):
        if split(wording, subject.name) != "train":
            held_out |= {fill(wording, subject, about).lower().rstrip(".") for about in (None, *subject.aspects)}
    seen = {example.prompt.lower().strip().rstrip(".") for example in stream(5, 9000) if example.form != "continuation"}
    assert len(seen) > 1500
    assert not seen & held_out


@pytest.mark.parametrize("kind", ["review", "sentence", "aspect", "detailed"])
def test_answers_are_about_their_subject_and_name_no_other(kind):
    corpus = Corpus(6)
    wordings = tuple(item for item in WORDINGS if item[1] == kind)
    for _ in range(600):
        request = corpus.request(wordings, "train")
        text = corpus.answer(request).text
        own = words_of(request.subject)
        assert any(re.search(rf"\b{word}\b", text) for word in own), text
        if request.about is not None:
            assert f"the {request.about.noun}" in text.lower()
        strangers = [name for name in SUBJECTS if name not in own and re.search(rf"\b{name}s?\b", text)]
        assert all(any(name in word for word in own) for name in strangers), (text, strangers)


def test_answers_are_whole_sentences_with_the_right_articles():
    corpus = Corpus(8)
    for _ in range(1500):
        text = corpus.chat().review.text
        assert re.fullmatch(r"([A-Z][^.!]*[.!] ?)+", text), text
        assert text.endswith((".", "!"))
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", text), text
        assert "{" not in text


def test_moods_and_details_show_in_the_grades():
    corpus = Corpus(9)
    by_kind: dict[str, list[tuple[float, float]]] = {}
    for _ in range(4000):
        request = corpus.request(WORDINGS, "train")
        review = corpus.answer(request)
        by_kind.setdefault(request.kind, []).append((review.sentiment, review.concreteness))
    mean = {kind: [sum(axis) / len(axis) for axis in zip(*grades, strict=True)] for kind, grades in by_kind.items()}
    assert mean["positive"][0] > 1.2 > -1.2 > mean["negative"][0]
    assert abs(mean["review"][0]) < 0.3
    assert mean["detailed"][1] > mean["review"][1] + 1
    assert all(-3 <= grade <= 3 for grades in by_kind.values() for pair in grades for grade in pair)


def test_the_quality_prompts_are_in_the_splits_that_they_name():
    found = build()
    assert (len(found["compare"]), len(found["fluency"])) == (64, 200)
    assert sum(item["split"] != "train" for item in found["fluency"]) == 100
    assert sum(item["form"] == "raw" for item in found["fluency"]) == 100
    seen = {example.prompt.strip() for example in stream(10, 9000)}
    assert not seen & {item["prompt"] for item in found["fluency"] if item["split"] != "train"}

"""Scores between denoising steps: the reward model's own values, a bounded part of the texts in each step, and failures
that touch no other request."""

from __future__ import annotations

from typing import Any

import pytest

from server.errors import InvalidRequest
from server.rewards.reward_model import RewardModel
from server.types import Message
from server.wire.messages import Event, Failed, Score, Scored
from server.worker.scoring import Scorer
from tests.support.models import Around, reward, score_text

QUESTION = (Message("user", "Is it good?"),)


MODELS = {"one": reward("dream"), "other": reward("llada", name="other", beside="dream")}


def run(scorer: Scorer, *requests: Score) -> tuple[dict[str, Any], int]:
    """The answer of each request, of which there is one, and the steps taken."""
    for each in requests:
        scorer.add(each)
    answers: dict[str, Event] = {}
    steps = 0
    while scorer.has_work:
        steps += 1
        for event in scorer.step():
            assert isinstance(event, Scored | Failed)
            assert event.job_id not in answers
            answers[event.job_id] = event
    return answers, steps


def scores(*responses: str, model: str = "one") -> Any:
    return pytest.approx([score_text(MODELS[model], QUESTION, text) for text in responses], abs=1e-9)


def request(identity: str, *responses: str, model: str = "one") -> Score:
    return Score(identity, model, [(QUESTION, response) for response in responses])


@pytest.mark.parametrize(("step_tokens", "expected_steps"), [(1, 9), (10_000, 2)], ids=["an item", "a model"])
def test_scores_are_the_models_whatever_the_packs(step_tokens: int, expected_steps: int) -> None:
    responses = {"a": ["Yes.", "No. " * 9, ""], "b": ["Perhaps."], "c": [], "d": ["It is."] * 5}
    models = dict(zip(responses, ("one", "other") * 2, strict=True))
    requests = [request(identity, *texts, model=models[identity]) for identity, texts in responses.items()]
    answers, steps = run(Scorer(MODELS, step_tokens), *requests)
    for identity, texts in responses.items():
        assert answers[identity].scores == scores(*texts, model=models[identity])
        assert (answers[identity].tokens > 0) == bool(texts)
    assert steps == expected_steps


@pytest.mark.parametrize("step_tokens", [1, 10_000])
def test_an_item_that_is_too_long_or_cannot_be_read_fails_its_request_alone(step_tokens: int) -> None:
    too_long = "word " * 3000
    unreadable = Score("broken", "one", [(QUESTION, "Yes."), ((None,), "Yes.")])  # type: ignore[list-item]
    long = request("long", "Yes.", too_long, "No.", too_long)
    requests = request("before", "Yes."), long, request("between", "Perhaps."), unreadable, request("after", "No.")
    answers, _ = run(Scorer(MODELS, step_tokens), *requests)
    assert (answers["long"].kind, answers["long"].param) == ("invalid_request", "documents")
    assert "item 1 takes" in answers["long"].message
    assert answers["broken"].kind == "internal"
    for identity, text in (("before", "Yes."), ("between", "Perhaps."), ("after", "No.")):
        assert answers[identity].scores == scores(text)


def test_only_the_items_of_a_step_are_read() -> None:
    """A list that fills many steps is tokenised in as many parts: a last one that cannot be read is not reached."""
    scorer = Scorer(MODELS, step_tokens=100)
    scorer.add(request("long", *["Yes."] * 50, "word " * 3000))
    assert scorer.step() == []
    assert scorer.has_work
    scorer.cancel("long")
    assert not scorer.has_work


def test_an_unknown_reward_model_is_refused_at_once() -> None:
    with pytest.raises(InvalidRequest, match="is not loaded"):
        Scorer(MODELS, 100).add(request("a", "Yes.", model="none"))


class Fragile(Around):
    """A reward model that breaks on one token, and notes how many sequences it was given each time."""

    def __init__(self, model: RewardModel, token: int, error: Exception) -> None:
        super().__init__(model)
        self.token, self.error = token, error
        self.packs: list[int] = []

    def score(self, sequences: list[list[int]]) -> Any:
        self.packs.append(len(sequences))
        if any(self.token in ids for ids in sequences):
            raise self.error
        return self.model.score(sequences)


@pytest.mark.parametrize("error", [IndexError("out of range"), MemoryError()], ids=repr)
def test_an_item_that_breaks_a_pack_fails_its_request_alone(error: Exception) -> None:
    encode = MODELS["one"].tokenizer.encode
    (bad,) = set(encode("Z")) - set(encode("Yes. No. Perhaps."))
    fragile: Any = Fragile(MODELS["one"], bad, error)
    requests = request("a", "Yes.", "No."), request("bad", "No.", "Z", "Yes."), request("c", "Perhaps.")
    answers, steps = run(Scorer({"one": fragile}, 10_000), *requests)
    assert answers["bad"].kind == ("out_of_memory" if isinstance(error, MemoryError) else "internal")
    assert answers["a"].scores == scores("Yes.", "No.")
    assert answers["c"].scores == scores("Perhaps.")
    assert steps == 1
    assert fragile.packs == [6, 1, 1, 1, 1, 1]  # the request's last item is not tried any more

"""Scores between denoising steps: the reward model's own values, a bounded part of the texts in each step, and failures
that touch no other request."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from server.errors import InvalidRequest
from server.rewards.reward_model import RewardModel
from server.types import Message
from server.wire.messages import Event, Failed, Score, Scored
from server.worker.scoring import Scorer
from tests.support.models import reward, score_text

QUESTION = (Message("user", "Is it good?"),)


@pytest.fixture(scope="module")
def models() -> dict[str, RewardModel]:
    return {"one": reward("dream"), "other": reward("llada", name="other", beside="dream")}


def run(scorer: Scorer) -> tuple[dict[str, Event], int]:
    """The answer of each request, and the steps taken."""
    answers: dict[str, Event] = {}
    steps = 0
    while scorer.has_work:
        steps += 1
        for event in scorer.step():
            assert isinstance(event, Scored | Failed)
            identity = event.job_id
            assert identity not in answers
            answers[identity] = event
    return answers, steps


def request(identity: str, *responses: str, model: str = "one") -> Score:
    return Score(identity, model, [(QUESTION, response) for response in responses])


def test_scores_are_the_models_whatever_the_packs(models: dict[str, RewardModel]) -> None:
    responses = {"a": ["Yes.", "No. " * 9, ""], "b": ["Perhaps."], "c": [], "d": ["It is."] * 5}
    for step_tokens, expected_steps in ((1, 9), (10_000, 2)):  # one item a step; one step a model
        scorer = Scorer(models, step_tokens)
        for index, (identity, texts) in enumerate(responses.items()):
            scorer.add(request(identity, *texts, model=("one", "other")[index % 2]))
        answers, steps = run(scorer)
        for index, (identity, texts) in enumerate(responses.items()):
            answer, model = answers[identity], models[("one", "other")[index % 2]]
            assert isinstance(answer, Scored)
            assert answer.scores == pytest.approx([score_text(model, QUESTION, text) for text in texts], abs=1e-9)
            assert (answer.tokens > 0) == bool(texts)
        assert steps == expected_steps


def test_an_item_that_is_too_long_fails_its_request_alone(models: dict[str, RewardModel]) -> None:
    too_long = "word " * 3000
    for step_tokens in (1, 10_000):
        scorer = Scorer(models, step_tokens)
        scorer.add(request("before", "Yes."))
        scorer.add(request("bad", "Yes.", too_long, "No.", too_long))
        scorer.add(request("after", "No."))
        answers, _ = run(scorer)
        failed = answers["bad"]
        assert isinstance(failed, Failed)
        assert (failed.kind, failed.param) == ("invalid_request", "documents")
        assert "item 1 takes" in failed.message
        for identity, text in (("before", "Yes."), ("after", "No.")):
            answer = answers[identity]
            assert isinstance(answer, Scored)
            assert answer.scores == pytest.approx([score_text(models["one"], QUESTION, text)], abs=1e-9)


def test_only_the_items_of_a_step_are_read(models: dict[str, RewardModel]) -> None:
    """A list that fills many steps is tokenised in as many parts: a last one that cannot be read is not reached."""
    scorer = Scorer(models, step_tokens=100)
    scorer.add(request("long", *["Yes."] * 50, "word " * 3000))
    assert scorer.step() == []
    assert scorer.has_work
    assert scorer.cancel("long")
    assert not scorer.has_work


def test_an_unknown_reward_model_is_refused_at_once(models: dict[str, RewardModel]) -> None:
    with pytest.raises(InvalidRequest, match="is not loaded"):
        Scorer(models, 100).add(request("a", "Yes.", model="none"))


def test_an_item_that_cannot_be_read_fails_its_request_alone(models: dict[str, RewardModel]) -> None:
    for step_tokens in (1, 10_000):
        scorer = Scorer(models, step_tokens)
        scorer.add(request("before", "Yes."))
        scorer.add(Score("broken", "one", [(QUESTION, "Yes."), ((None,), "Yes.")]))  # type: ignore[list-item]
        scorer.add(request("after", "Yes."))
        answers, _ = run(scorer)
        assert isinstance(answers["broken"], Failed)
        assert answers["broken"].kind == "internal"
        assert isinstance(answers["before"], Scored)
        assert isinstance(answers["after"], Scored)


class Fragile:
    """A reward model that breaks on one token, and notes how many sequences it was given each time."""

    def __init__(self, model: RewardModel, token: int, error: Exception) -> None:
        self.model, self.token, self.error = model, token, error
        self.packs: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def score(self, sequences: list[list[int]]) -> torch.Tensor:
        self.packs.append(len(sequences))
        if any(self.token in ids for ids in sequences):
            raise self.error
        return self.model.score(sequences)


@pytest.mark.parametrize("error", [IndexError("out of range"), MemoryError()], ids=repr)
def test_an_item_that_breaks_a_pack_fails_its_request_alone(models: dict[str, RewardModel], error: Exception) -> None:
    model = models["one"]
    (bad,) = set(model.tokenizer.encode("Z")) - set(model.tokenizer.encode("Yes. No. Perhaps."))
    fragile: Any = Fragile(model, bad, error)
    scorer = Scorer({"one": fragile}, 10_000)
    for identity, texts in {"a": ["Yes.", "No."], "bad": ["No.", "Z", "Yes."], "c": ["Perhaps."]}.items():
        scorer.add(request(identity, *texts))
    answers, steps = run(scorer)
    failed = answers.pop("bad")
    assert isinstance(failed, Failed)
    assert failed.kind == ("out_of_memory" if isinstance(error, MemoryError) else "internal")
    for identity, texts in {"a": ["Yes.", "No."], "c": ["Perhaps."]}.items():
        answer = answers[identity]
        assert isinstance(answer, Scored)
        assert answer.scores == pytest.approx([score_text(model, QUESTION, text) for text in texts], abs=1e-9)
    assert steps == 1
    assert fragile.packs == [6, 1, 1, 1, 1, 1]  # the request's last item is not tried any more

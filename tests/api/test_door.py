"""What no step of this server could hold is refused before it is queued, by the field that asks for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from server.api.convert import make_plan
from server.api.fields import ChatCompletionRequest, CompletionRequest
from server.budget import Budget
from server.errors import InvalidRequest
from server.settings import load
from server.text.tokenizer import Tokenizer
from tests.api.scripted_engine import GOLDEN, INFO

LARGEST = Budget(tokens=60, guided_rows=20, logit_rows=30, reward_tokens=18)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(GOLDEN / "dlm")


def plan(tokenizer: Tokenizer, largest: Budget = LARGEST, **body: Any) -> Any:
    info = replace(INFO, largest=largest)
    schema = ChatCompletionRequest if "messages" in body else CompletionRequest
    return make_plan(schema.model_validate(body), info, tokenizer, load({}), "id")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": "Hi", "max_tokens": 31}, "31 rows of logits, more than the 30 "),
        ({"prompt": [43] * 40, "max_tokens": 21}, "61 canvas tokens, more than the 60 "),
        ({"prompt": [43] * 20, "max_tokens": 11, "diffusion": {"cfg_scale": 0.5}}, "62 canvas tokens"),
        ({"prompt": "Hi", "max_tokens": 19, "guidance": "entrgi"}, "19 reward-model tokens, more than the 18 "),
        (
            {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 21, "guidance": "aps"},
            "21 guided rows of logits, more than the 20 ",
        ),
    ],
)
def test_the_budget_that_is_exceeded_is_named(tokenizer: Tokenizer, body: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as refused:
        plan(tokenizer, **body)
    assert refused.value.param == "max_tokens"
    assert plan(tokenizer, Budget(), **body).jobs  # nothing else is wrong with it


def test_what_just_fits_is_taken_whatever_the_number_of_its_answers(tokenizer: Tokenizer) -> None:
    taken = plan(tokenizer, prompt=[43] * 30, max_tokens=30, n=5)
    assert taken.jobs[0].sampling.best_of == 5
    assert plan(tokenizer, prompt="Hi", max_tokens=18, guidance="entrgi", best_of=8).jobs
    assert plan(tokenizer, prompt="Hi", max_tokens=25, guidance="bon").jobs  # steered by nothing: no guided rows

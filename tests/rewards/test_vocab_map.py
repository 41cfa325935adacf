"""The vocabulary map: by string, never by id."""

from __future__ import annotations

import logging

import pytest
import tokenizers
from tokenizers import models

from server.errors import ConfigurationError
from server.rewards.vocab_map import map_vocabulary
from server.text.tokenizer import Tokenizer


def make(words: list[str], **named: str) -> Tokenizer:
    vocabulary = {word: index for index, word in enumerate(words)}
    return Tokenizer(tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=words[0])), named)


DIFFUSION = make(["a", "b", "<mask>", "c", "<eos>"])
REWARD = make(["c", "<eos>", "<unk>", "b", "a"], unk_token="<unk>", eos_token="<eos>")


def test_strings_are_matched_and_the_rest_reads_as_unknown(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        ids, coverage = map_vocabulary("rm", DIFFUSION, REWARD, 7)
    assert ids == [4, 3, 2, 0, 1, 2, 2]
    assert coverage == 4 / 5
    assert "rm knows 4 of 5 tokens" in caplog.text
    assert "80.00%" in caplog.text
    assert "<mask>" in caplog.text


def test_without_an_unknown_token_eos_stands_in() -> None:
    reward = make(["c", "<eos>", "b", "a"], eos_token="<eos>")
    assert map_vocabulary("rm", DIFFUSION, reward, 6)[0] == [3, 2, 1, 0, 1, 1]
    assert map_vocabulary("rm", DIFFUSION, reward, 6, "zero")[0] == [3, 2, -1, 0, 1, -1]


def test_nothing_to_fall_back_on_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="vocab_fallback"):
        map_vocabulary("rm", DIFFUSION, make(["a"]), 5)
    assert map_vocabulary("rm", DIFFUSION, make(["a"]), 5, "zero")[0] == [0, -1, -1, -1, -1]


def test_a_tokenizer_wider_than_the_logits_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="vocab_size"):
        map_vocabulary("rm", DIFFUSION, REWARD, 4)

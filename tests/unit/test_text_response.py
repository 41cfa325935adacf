"""Where a response's text ends, and that its stream is the same text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.text.response import StreamDecoder, finish_text
from tests.support.models import tokenizer

TOKENIZER = tokenizer()
EOS, TURN = 0, 2
STOPS = (EOS, TURN)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text)


def byte_ids(text: str) -> list[int]:
    """One token a byte, as byte-level vocabularies write it: printable Latin-1 as itself, the rest from U+0100 on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    found = [TOKENIZER.id_of(chr(b if b in own else 0x100 + others.index(b))) for b in text.encode()]
    return [index for index in found if index is not None]


@pytest.mark.parametrize(
    ("tokens", "ignore_eos", "text", "reason"),
    [
        ([*ids("one two"), TURN, *ids(" three"), EOS], False, "one two", "stop"),
        ([EOS], False, "", "stop"),
        (ids("one two"), False, "one two", "length"),
        ([*ids("one"), TURN, *ids(" two"), EOS], True, "one two", "length"),
    ],
)
def test_a_text_ends_with_a_stop_token_or_the_canvas(
    tokens: list[int], ignore_eos: bool, text: str, reason: str
) -> None:
    finished = finish_text(TOKENIZER, tokens, STOPS, ignore_eos=ignore_eos)
    assert (finished.text, finished.finish_reason, finished.stop_reason) == (text, reason, None)
    assert finished.completion_tokens == len(tokens if ignore_eos else ids(text))


def test_the_earliest_stop_string_cuts_the_text() -> None:
    finished = finish_text(TOKENIZER, [*ids("alpha beta gamma"), EOS], STOPS, ["gamma", " be", "absent"])
    assert (finished.text, finished.finish_reason, finished.stop_reason) == ("alpha", "stop", " be")
    assert TOKENIZER.decode(ids("alpha beta gamma")[: finished.completion_tokens]).startswith("alpha")
    assert not TOKENIZER.decode(ids("alpha beta gamma")[: finished.completion_tokens - 1]).startswith("alpha")
    assert finish_text(TOKENIZER, ids("ab"), STOPS, ["a"]).completion_tokens == 0
    # Where two begin at the same place, the first named.
    assert finish_text(TOKENIZER, ids("abc"), STOPS, ["bc", "b"]).stop_reason == "bc"
    # A stop string after the stop token is not in the text.
    assert finish_text(TOKENIZER, [*ids("ab"), EOS, *ids("cd")], STOPS, ["cd"]).stop_reason is None


@pytest.mark.parametrize("ignore_eos", [False, True])
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_the_stream_is_the_text(ignore_eos: bool, data: st.DataObject) -> None:
    """Of any stop strings, and wherever the bytes of a character are cut. A small alphabet makes stop strings overlap;
    pieces of characters make broken and completed UTF-8 common."""
    letters = "abé日本😀"
    whole = [piece for letter in letters for piece in (byte_ids(letter), ids(letter))]
    broken = [byte_ids("日")[:2], byte_ids("é")[:1], byte_ids("😀")[1:], [TURN], [1], [3]]
    pieces = data.draw(st.lists(st.sampled_from(whole) | st.sampled_from(broken), max_size=16))
    tokens = [token for piece in pieces for token in piece]
    text = TOKENIZER.decode(tokens)
    inside = st.tuples(st.integers(0, len(text)), st.integers(1, 4)).map(lambda at: text[at[0] : sum(at)])
    strings = (st.text(letters + "\ufffd", min_size=1, max_size=4) | inside).filter(bool)
    stop = data.draw(st.lists(strings, max_size=3))
    order = data.draw(st.permutations(range(len(tokens))) | st.just(range(len(tokens))))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=6)))
    whole_text = finish_text(TOKENIZER, tokens, STOPS, stop, ignore_eos).text
    decoder = StreamDecoder(TOKENIZER, STOPS, stop, ignore_eos)
    sent = ""
    for start, end in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        sent += decoder.reveal((position, tokens[position]) for position in order[start:end])
        assert whole_text.startswith(sent)
    assert sent + decoder.rest(whole_text) == whole_text


def test_the_stream_sends_as_soon_as_it_can() -> None:
    decoder = StreamDecoder(TOKENIZER, STOPS, ["END"])
    first, *rest = ids("😀")
    steps = [
        (ids("hello "), "hello "), (ids("E"), ""), (ids("N"), ""), (ids("d"), "ENd"), ([first], ""), (rest, "😀"),
        (ids("END more"), ""),
    ]  # fmt: skip
    position = 0
    for tokens, delta in steps:
        assert decoder.reveal(enumerate(tokens, position)) == delta
        position += len(tokens)
    assert decoder.tokens == position - len(ids("END more"))
    assert decoder.reveal([(position + 1, ids("a")[0])]) == ""  # a position before it is masked still
    assert decoder.rest("hello ENd😀") == ""

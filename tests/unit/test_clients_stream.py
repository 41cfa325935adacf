"""Server-sent events and the events made of them, however the network cuts the bytes."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients import ApiError, CanvasFrame, ChoiceFinished, Event, StreamBroken, Summary, TextDelta, UnexpectedResponse
from clients.events import StreamReader
from clients.sse import EventParser

# The example of the HTML standard, section 9.2.6, with one of each line end and a comment.
STANDARD = b": test stream\n\ndata: first event\nid: 1\r\n\r\ndata:second event\rid\r\rdata:  third event\n\n"


def parse(*chunks: bytes) -> list[bytes]:
    parser = EventParser()
    return [data for chunk in chunks for data in parser.feed(chunk)]


def read(*chunks: bytes) -> list[Event]:
    reader = StreamReader()
    events = [event for chunk in chunks for event in reader.feed(chunk)]
    reader.close()
    return events


def sse(*objects: object) -> bytes:
    lines = [o if isinstance(o, str) else json.dumps(o, ensure_ascii=False) for o in objects]
    return "".join(f"data: {line}\n\n" for line in lines).encode()


def test_data_lines_are_joined_and_an_unfinished_event_is_not_given() -> None:
    assert parse(b"data: a\ndata: b\n\ndata: c\n") == [b"a\nb"]


@given(st.lists(st.integers(0, len(STANDARD)), max_size=12))
def test_cuts_of_the_network_do_not_matter(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(STANDARD)]
    chunks = [STANDARD[a:b] for a, b in pairwise(edges)]
    assert parse(*chunks) == [b"first event", b"second event", b" third event"]


@given(st.text())
def test_any_text_survives_unescaped(text: str) -> None:
    """Also U+2028, U+0085 and the like, which are line ends for Python and httpx but not for event streams."""
    text = text.encode("utf-8", "replace").decode()
    assert [json.loads(data) for data in parse(sse({"text": text}))] == [{"text": text}]


def test_completion_stream() -> None:
    canvas = {"prompt": 0, "trajectory": 1, "step": 3, "tokens": ["Nice", None], "reward": 0.5, "ancestor": 0}
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    counts = {"steps": 2, "model_calls": 2, "reward_calls": 6, "queue_ms": 1.0, "generation_ms": 8.0}
    report = {"method": "entrgi", "reward_models": ["joy"], "seed": 7, "rewards": [[2.5]], **counts}
    report |= {"resampled": [[[8, [0, 0]]]], "weights": [[0.5, 0.5]], "rewards_by_model": {"joy": [[None]]}}
    stream = sse(
        {"choices": [{"index": 0, "text": "Nice "}]},
        {"choices": [], "canvas": canvas},
        {"choices": [{"index": 0, "text": "\u2028hotel"}]},
        {"choices": [{"index": 0, "text": "", "finish_reason": "stop", "reward": 2.5, "token_ids": [4, 5]}]},
        {"choices": [], "usage": usage, "guidance": report},
        "[DONE]",
    )
    *events, last = read(b": keep-alive\n\n", *(stream[i : i + 7] for i in range(0, len(stream), 7)))
    assert events == [
        TextDelta(0, "Nice "),
        CanvasFrame(prompt=0, trajectory=1, step=3, tokens=["Nice", None], entropy=None, reward=0.5, ancestor=0),
        TextDelta(0, "\u2028hotel"),
        ChoiceFinished(0, "stop", reward=2.5, token_ids=[4, 5]),
    ]
    assert isinstance(last, Summary)
    assert last.usage is not None
    assert last.usage.total_tokens == 5
    assert last.guidance is not None
    assert last.guidance.rewards == [[2.5]]
    assert last.guidance.resampled == [[(8, [0, 0])]]


def test_chat_stream() -> None:
    events = read(
        sse(
            {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
            {"choices": [{"index": 0, "delta": {"content": "Hi"}, "finish_reason": None}]},
            {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]},
            "[DONE]",
        )
    )
    assert events == [TextDelta(0, "Hi"), ChoiceFinished(0, "length"), Summary()]


def test_an_error_inside_the_stream_is_raised_after_the_events_before_it() -> None:
    reader = StreamReader(request_id="r-1")
    error = {"message": "broke", "type": "server_error", "param": None, "code": "internal_error"}
    events = reader.feed(sse({"choices": [{"index": 0, "text": "a"}]}, {"error": error}, "[DONE]"))
    assert next(events) == TextDelta(0, "a")
    with pytest.raises(ApiError) as caught:
        next(events)
    assert (caught.value.message, caught.value.code) == ("broke", "internal_error")
    assert (caught.value.status, caught.value.request_id) == (None, "r-1")


def test_a_stream_without_its_end_is_broken() -> None:
    with pytest.raises(StreamBroken):
        read(sse({"choices": [{"index": 0, "text": "a", "finish_reason": "stop"}]}))


@pytest.mark.parametrize("data", ["{", "[]", '{"choices": [{"index": "zero"}]}', '{"canvas": {"prompt": 0}}'])
def test_what_is_not_a_chunk_is_refused(data: str) -> None:
    with pytest.raises(UnexpectedResponse):
        read(sse(data))

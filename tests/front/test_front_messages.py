"""Messages survive the wire whatever they hold; what is no message is refused before it costs anything."""

from __future__ import annotations

import dataclasses
import pickle
import socket
import subprocess
import sys
import types
import typing
from typing import Annotated, Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.methods import METHODS
from server.types import DiffusionParams, GuidanceParams, Job, SamplingParams
from server.wire import messages
from server.wire.channel import WorkerChannel
from server.wire.messages import Cancel, ChannelClosed, Event, FrameTooLarge, ProtocolError, Shutdown, Submit, ToWorker
from tests.support.serving import ROOT

# Text as clients send it: any code point but the surrogates, which UTF-8 cannot hold.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


def anything(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a type, from its annotations alone, so that a new field is covered the day it appears."""
    simple: dict[Any, st.SearchStrategy[Any]] = {
        int: st.integers(-(2**63), 2**64 - 1),
        float: st.floats(allow_nan=False),
        str: TEXT,
        bool: st.booleans(),
        type(None): st.none(),
    }
    if hint in simple:
        return simple[hint]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return within(anything(args[0]), args[0], args[1:])
    if origin is typing.Literal:
        return st.sampled_from(args)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([anything(arg) for arg in args])
    if origin is list:
        return st.lists(anything(args[0]), max_size=3)
    if origin is tuple and args[-1] is Ellipsis:
        return st.lists(anything(args[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*[anything(arg) for arg in args])
    if origin is dict:
        return st.dictionaries(anything(args[0]), anything(args[1]), max_size=3)
    assert dataclasses.is_dataclass(hint) or issubclass(hint, msgspec.Struct), hint
    hints = typing.get_type_hints(hint, include_extras=True)
    fields = {name: st.deferred(lambda h=h: anything(h)) for name, h in hints.items()}
    if hint is GuidanceParams:  # it refuses a method that is not in the table
        fields["method"] = st.sampled_from([*METHODS])
    if hint is DiffusionParams:  # it refuses blocks without a length
        blocks = st.builds(hint, **fields | {"block_length": anything(int)})
        return st.one_of(st.builds(hint, **fields | {"blocks_from": st.none()}), blocks)
    return st.builds(hint, **fields)


def within(values: st.SearchStrategy[Any], kind: Any, constraints: tuple[Any, ...]) -> st.SearchStrategy[Any]:
    """Those values that msgspec's constraints let through."""
    for meta in constraints:
        if meta.pattern is not None:
            values = st.from_regex(meta.pattern, fullmatch=True)
        if kind is int:
            values = st.integers(-(2**63) if meta.ge is None else meta.ge, 2**64 - 1 if meta.le is None else meta.le)
        if kind is float:
            least = meta.gt if meta.ge is None else meta.ge
            values = st.floats(least, meta.le, allow_nan=False, exclude_min=meta.gt is not None)
    return values


@pytest.mark.parametrize("kind", typing.get_args(ToWorker) + typing.get_args(Event), ids=lambda kind: kind.__name__)
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_every_message_survives_the_wire(kind: type, data: st.DataObject) -> None:
    message = data.draw(anything(kind))
    encoded = messages.frame(message)
    assert messages.body_length(encoded[:4]) == len(encoded) - 4
    decoder = messages.TO_WORKER if kind in typing.get_args(ToWorker) else messages.EVENT
    assert messages.decode(decoder, encoded[4:]) == message


@given(body=st.binary(max_size=200))
@settings(deadline=None)
def test_noise_is_never_a_message_nor_another_exception(body: bytes) -> None:
    for decoder in (messages.TO_WORKER, messages.EVENT):
        try:
            decoded = messages.decode(decoder, body)
        except ProtocolError:
            continue
        assert isinstance(decoded, msgspec.Struct)


@pytest.mark.parametrize("body", [pickle.dumps(Cancel("a")), messages.frame(messages.Started("a"))[4:]])
def test_a_pickle_or_an_event_is_not_a_message_to_the_worker(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        messages.decode(messages.TO_WORKER, body)


def test_a_frame_over_the_limit_is_neither_sent_nor_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "MAX_FRAME_BYTES", 1000)
    with pytest.raises(FrameTooLarge):
        messages.frame(Submit(Job("a", tuple(range(1000)), SamplingParams(1), DiffusionParams(1))))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall((1001).to_bytes(4, "big"))  # announced, not there
        with pytest.raises(ProtocolError):
            WorkerChannel(theirs).receive(block=True)


@given(ids=st.lists(TEXT, min_size=1, max_size=6), cuts=st.lists(st.integers(1, 9), min_size=1))
@settings(max_examples=50, deadline=None)
def test_the_worker_end_reassembles_frames_from_any_pieces(ids: list[str], cuts: list[int]) -> None:
    stream = b"".join(messages.frame(Cancel(identity)) for identity in ids)
    ours, theirs = socket.socketpair()
    received: list[ToWorker] = []
    with ours, theirs:
        channel = WorkerChannel(theirs)
        position = turn = 0
        while position < len(stream):
            size = cuts[turn % len(cuts)]
            ours.sendall(stream[position : position + size])
            received += channel.receive(block=False)
            position, turn = position + size, turn + 1
    assert received == [Cancel(identity) for identity in ids]


def test_the_worker_end_notices_that_its_parent_is_gone() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        channel = WorkerChannel(theirs)
        ours.sendall(messages.frame(Shutdown()))
        assert channel.receive(block=True) == [Shutdown()]
        ours.close()
        with pytest.raises(ChannelClosed):
            channel.receive(block=True)
        with pytest.raises(ChannelClosed):
            channel.send([messages.Started("a")])


def test_the_http_process_imports_no_torch_no_numpy_and_no_worker() -> None:
    """Whatever it imports by way of others: the import contract sees direct imports only."""
    code = (
        "import sys, server.front.engine\n"
        "print([name for name in ('torch', 'numpy', 'server.worker', 'transformers') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"

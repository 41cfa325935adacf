"""Who may enter the diffusion trunk when two lanes run: one at a time, and on a GPU in an order that streams keep."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from server.worker.overlap import Lanes

CPU = torch.device("cpu")
SECONDS = 60.0  # in which lanes must meet; far more than they need


def lanes() -> Lanes:
    """Lanes that take anything that can be halved."""
    return Lanes(CPU, least_tokens=1, least_trajectories=1)


def test_one_lane_at_a_time_enters_the_trunk() -> None:
    here, both = lanes(), threading.Barrier(2)

    def forward() -> torch.Tensor:
        with pytest.raises(threading.BrokenBarrierError):  # they would meet if both were inside
            both.wait(0.3)
        both.reset()
        return torch.ones(1)

    results = here.run((lambda: here.trunk(forward), lambda: here.trunk(forward)))
    assert [float(result) for result in results] == [1.0, 1.0]


class Stream:
    """Stands for a CUDA stream where there is none: it knows which work it comes after, its own and that of others."""

    def __init__(self, device: object = None) -> None:
        self.after: set[object] = set()

    def wait_stream(self, other: Stream) -> None:
        self.after |= other.after

    def work(self) -> tuple[object, set[object]]:
        """Some work, and all that is done before it."""
        before, mark = set(self.after), object()
        self.after.add(mark)
        return mark, before


class Output:
    """Stands for a tensor on a GPU."""

    def __init__(self) -> None:
        self.recorded: list[Stream] = []

    def record_stream(self, stream: Stream) -> None:
        self.recorded.append(stream)


@pytest.mark.parametrize("trunk_fails", [False, True])
def test_streams_are_ordered_around_the_lanes_and_the_trunk(monkeypatch: pytest.MonkeyPatch, trunk_fails: bool) -> None:
    """Work on stand-ins for streams: a lane comes after the caller's work and before what it does next; the trunk after
    the lane's work, before its next, and after the other lane's trunk."""
    caller, here = Stream(), threading.local()

    def current(device: object = None) -> Stream:
        return getattr(here, "stream", caller)

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        before, here.stream = current(), stream
        try:
            yield
        finally:
            here.stream = before

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", current)
    monkeypatch.setattr(torch.cuda, "stream", on)
    made: Any = Lanes(torch.device("cuda"))
    trunks: list[tuple[object, set[object]]] = []
    first, _ = caller.work()

    def lane() -> object:
        packed, before = current().work()
        assert first in before
        output: Any = Output()

        def forward() -> Any:
            mark, seen = current().work()
            assert packed in seen
            assert all(earlier in seen for earlier, _ in trunks)
            trunks.append((mark, seen))
            if trunk_fails:
                raise RuntimeError("no room")
            return output

        try:
            made.trunk(forward)
        except RuntimeError:
            assert trunk_fails
        last, before = current().work()
        mine = [mark for mark, seen in trunks if packed in seen]
        assert mine[0] in before
        assert output.recorded == ([] if trunk_fails else [current()])
        return last

    lasts = made.run((lane, lane))
    _, before = caller.work()
    assert set(lasts) < before
    assert len(trunks) == 2
    assert len({id(stream) for stream in (caller, made._trunk_stream, *made._streams)}) == 4

"""What a reader is given: bounded backlog, no event twice; and when a refused client should come back."""

from __future__ import annotations

import pytest

from server.front.admission import Throughput
from server.front.pending import CANVAS_BACKLOG_TOKENS, Pending
from server.wire.messages import Canvas, Event, Failed, Progress, Started
from server.wire.stats import Distribution, RunnerStats


async def test_a_slow_reader_loses_old_canvases_and_nothing_else() -> None:
    pending = Pending("a", b"")
    length = CANVAS_BACKLOG_TOKENS // 8
    for step in range(100):
        pending.deliver(Progress("a", 0, step, [(step, step)]))
        pending.deliver(Canvas("a", 0, step, [0] * length))
    pending.close(Failed("a", "internal", "the end"))
    events: list[Event] = []
    while not events or not isinstance(events[-1], Failed):
        events.append(await pending.next_event())
    assert [event.step for event in events if isinstance(event, Progress)] == list(range(100))
    assert [event.step for event in events if isinstance(event, Canvas)] == list(range(92, 100))
    assert isinstance(events[-2], Canvas)
    # What was read makes room again, and one canvas larger than the backlog is still delivered.
    for step in range(100, 108):
        pending.deliver(Canvas("a", 0, step, [0] * length))
    assert [(await pending.next_event()).step for _ in range(8)] == list(range(100, 108))  # type: ignore[union-attr]
    pending.deliver(Canvas("a", 0, 200, [0] * (CANVAS_BACKLOG_TOKENS + 1)))
    assert isinstance(await pending.next_event(), Canvas)


async def test_a_second_run_gives_only_what_is_new() -> None:
    pending = Pending("a", b"")
    first_run = [Started("a"), Progress("a", 0, 0, [(3, 5)]), Canvas("a", 0, 0, [-1]), Progress("a", 1, 0, [(1, 1)])]
    second_run = [*first_run, Progress("a", 0, 1, [(4, 4)]), Canvas("a", 0, 1, [9])]
    assert all(pending.deliver(event) for event in first_run)
    assert all(pending.deliver(event) for event in second_run)
    assert [await pending.next_event() for _ in range(6)] == second_run
    assert not pending.deliver(Progress("a", 0, 1, [(4, 5)]))


def ten_a_second() -> Throughput:
    throughput = Throughput(0.0)
    throughput.taken(256, 256, 0.0)
    for tenth in range(101):
        throughput.finished(tenth / 10)
    return throughput


def test_before_a_rate_is_known_places_come_free_when_jobs_are_expected_to_end() -> None:
    ends = [40.0, 0.2, 12.0, 90.0]
    waits = [Throughput(0.0).retry_after_seconds(4, 10.0, places, lambda: ends) for places in (1, 2, 3, 4, 9)]
    assert waits == [1.0, 12.0, 40.0, 60.0, 60.0]


def test_refused_clients_come_back_one_by_one_at_the_rate_at_which_work_leaves() -> None:
    assert Throughput(0.0).per_second(0.0) is None
    throughput = ten_a_second()
    assert throughput.per_second(10.0) == pytest.approx(10.0)
    waits = [throughput.retry_after_seconds(256, 10.0) for _ in range(400)]
    assert waits[0] == 1.0  # never less
    assert waits[20:200] == pytest.approx([(index + 1) / 10 for index in range(20, 200)])
    assert max(waits) == pytest.approx(25.6)  # by then everything in flight has left
    throughput = ten_a_second()
    assert [throughput.retry_after_seconds(256, 10.0, 50) for _ in range(2)] == pytest.approx([5.0, 10.0])


def test_old_answers_say_nothing_about_the_present_rate() -> None:
    throughput = ten_a_second()
    assert throughput.per_second(100.0) is None
    assert throughput.retry_after_seconds(256, 100.0) > 0


def test_idle_times_do_not_slow_the_rate() -> None:
    throughput = Throughput(0.0)
    throughput.taken(0, 10, 0.0)
    for minute in range(1, 10):  # one request a minute
        throughput.taken(1, 10, 60.0 * minute)
        throughput.finished(60.0 * minute + 0.5)
        throughput.taken(0, 10, 60.0 * minute + 0.5)
    throughput.taken(10, 10, 1000.0)
    for tenth in range(1, 21):  # then ten a second
        throughput.finished(1000.0 + tenth / 10)
    assert throughput.per_second(1002.0) == pytest.approx(10.0)
    throughput.taken(0, 10, 1002.0)
    throughput.taken(10, 10, 2000.0)
    assert throughput.per_second(2000.0) == pytest.approx(10.0)  # the last known, however long ago


def test_places_that_come_free_together_do_not_look_like_a_high_rate() -> None:
    throughput = Throughput(0.0)
    throughput.taken(32, 32, 0.0)
    for _ in range(16):  # a batch that ends in one step
        throughput.finished(2.0)
    assert throughput.per_second(2.0) == pytest.approx(8.0)


def test_statistics_add_up() -> None:
    one, other = RunnerStats(running=2, denoising_steps=3), RunnerStats(denoising_steps=4)
    one.guidance_seconds.add(0.02)
    other.guidance_seconds.add(100.0)
    both = one.plus(other)
    assert (both.running, both.denoising_steps, one.guidance_seconds.count) == (2, 7, 1)
    assert (both.guidance_seconds.count, both.guidance_seconds.counts[-1]) == (2, 1)
    assert both.guidance_seconds.total == pytest.approx(100.02)


def test_a_value_on_a_bound_belongs_below_it() -> None:
    histogram = Distribution((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 2.5):
        histogram.add(value)
    assert histogram.counts == [2, 2, 1]

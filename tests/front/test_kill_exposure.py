"""The arithmetic by which the kill program judges its losses: against a simulation with the engine's own bookkeeping,
and against a log whose times are known."""

from __future__ import annotations

import json
import random

import pytest

from server.front.dispatch import Dispatcher
from server.front.pending import Pending
from tests.faults.kill_exposure import expected_losses, exposure, seconds_alone


def lost_to_kills(kills: int, running: int, tau: float, gap: float, seed: int) -> tuple[int, list[int]]:
    """One worker that has `running` new requests whenever its suspects are through, each taking `tau` seconds alone; a
    kill at a random moment after the last: requests that died twice, and the suspects after each kill but the last."""
    generator = random.Random(seed)
    dispatcher = Dispatcher(1)
    lost, suspects = 0, []
    for kill in range(kills):
        left = generator.uniform(0.0, gap)
        while dispatcher.suspects:
            ((_, alone),) = dispatcher.assign([0], more_to_come=False)
            alone.begun = True
            if left < tau:
                break
            left -= tau
            dispatcher.remove(alone)
        if not dispatcher.suspects:
            for index in range(running - len(dispatcher.jobs_of(0))):
                dispatcher.add(Pending(f"{kill}/{index}", b""))
            for _, pending in dispatcher.assign([0], more_to_come=False):
                pending.begun = True
        lost += len(dispatcher.lost(0))
        suspects.append(dispatcher.suspects)
    return lost, suspects[:-1]


@pytest.mark.parametrize(("running", "tau", "gap"), [(8, 0.8, 20.0), (4, 0.3, 20.0), (12, 2.0, 20.0), (1, 19.0, 20.0)])
def test_the_expectation_is_that_of_the_engines_bookkeeping(running: int, tau: float, gap: float) -> None:
    lost, suspects = lost_to_kills(4000, running, tau, gap, seed=3)
    expected, deviation = expected_losses(suspects, tau, gap)
    assert abs(lost - expected) <= 4 * deviation
    assert 0 < deviation < 40


def test_two_workers_halve_the_chance() -> None:
    assert expected_losses([10, 0, 5], 1.0, 20.0) == pytest.approx((0.75, (0.25 + 0.1875) ** 0.5))
    assert expected_losses([10, 0, 5], 1.0, 20.0, workers=2)[0] == pytest.approx(0.375)
    assert expected_losses([100], 1.0, 20.0) == (1.0, 0.0)


def test_who_takes_longer_is_more_often_hit() -> None:
    generator = random.Random(5)
    latencies = [0.1, 0.5, 2.0]
    hit = generator.choices(latencies, weights=latencies, k=20_000)
    assert seconds_alone(latencies) == pytest.approx(sum(hit) / len(hit), rel=0.02)


def line(second: float, message: str, **fields: object) -> str:
    return json.dumps({"time": f"2026-01-01T00:00:{second:06.3f}+00:00", "message": message, **fields})


def test_a_log_of_one_worker() -> None:
    log = [
        "not JSON",
        line(10, "worker 0 ended with signal 9"),
        line(10, "worker 0 had 5 requests; ...", suspects=4, convicted=[]),
        line(12, "worker 0 (process 8) is ready"),
        line(12, "request a runs alone on worker 0"),
        line(13, "request a has run alone"),
        line(13, "request b runs alone on worker 0"),
        line(13.5, "worker 0 ended with signal 9"),
        line(13.5, "worker 0 had 1 requests; ...", suspects=2, convicted=["b"]),
        line(20, "request c runs alone on worker 0"),
        line(22, "request c has run alone"),
        line(22, "request d runs alone on worker 0"),
        line(22.5, "worker 0 ended with signal 9"),
        line(22.5, "worker 0 had 1 requests; ...", suspects=1, convicted=[]),  # it had not begun
        line(25, "request d runs alone on worker 0"),
        line(26, "request d has run alone"),
    ]
    found = exposure(log)
    assert (found.suspects, found.convicted) == ([4, 2, 1], [0, 1, 0])
    assert found.seconds == pytest.approx(1.0 + 0.5 + 2.0 + 0.5 + 1.0)
    assert found.ran == 4
    assert found.seconds_a_suspect == pytest.approx(5.0 / 4)


def test_a_log_of_two_workers() -> None:
    """Suspects run on both, and wait while one is busy."""
    log = [
        line(10, "worker 0 ended with signal 9"),
        line(10, "worker 0 had 3 requests; ...", suspects=3, convicted=[]),
        line(15, "request a runs alone on worker 0"),
        line(16, "request b runs alone on worker 1"),
        line(17, "request b has run alone"),
        line(18, "worker 1 ended with signal 9"),
        line(19, "request a has run alone"),
        line(19, "request c runs alone on worker 0"),
        line(21, "request c has run alone"),
    ]
    found = exposure(log)
    assert (found.seconds, found.ran) == (pytest.approx(4.0 + 1.0 + 2.0), 3)

"""What kills from outside cost, played through with the engine's own bookkeeping.

A kill hits a request that is alone only after earlier kills have made it a suspect, so losses come from chains of kills
that follow each other faster than suspects are through. The simulated workers share their processor evenly among what
they hold: k requests together take as long as one after the other, which is no better than a real one.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest

from server.front.dispatch import Dispatcher
from server.front.pending import Pending


def losses(kills: int, clients: int, seconds: Sequence[float], gap: float, workers: int = 1, seed: int = 0) -> int:
    """How many requests are convicted by `kills` kills of workers, each at a moment uniform in [0, `gap`] seconds after
    the last. The `clients` always have one request each in flight; what it takes alone is drawn from `seconds`."""
    generator = random.Random(seed)
    dispatcher = Dispatcher(workers)
    names = itertools.count()
    left: list[dict[Pending, float]] = [{} for _ in range(workers)]  # seconds of computing left for what each has
    in_flight = lost = 0
    for _ in range(kills):
        until_kill = generator.uniform(0.0, gap)
        while True:
            for _ in range(clients - in_flight):
                dispatcher.add(Pending(str(next(names)), b"", cost=generator.choice(seconds)))
            in_flight = clients
            for worker, pending in dispatcher.assign(range(workers), more_to_come=False):
                pending.begun = True
                left[worker][pending] = pending.cost
            pause, worker = min((min(has.values()) * len(has), worker) for worker, has in enumerate(left) if has)
            for has in left:
                for pending in has:
                    has[pending] -= min(pause, until_kill) / len(has)
            if pause >= until_kill:
                break
            until_kill -= pause
            done = min(left[worker], key=left[worker].__getitem__)
            del left[worker][done]
            dispatcher.remove(done)
            in_flight -= 1
        victim = generator.randrange(workers)
        left[victim].clear()
        convicted = sum(pending.convicted for pending in dispatcher.lost(victim))
        in_flight -= convicted
        lost += convicted
    return lost


def test_one_client_is_hit_as_often_as_chance_has_it() -> None:
    """Its only request is always alone. After a kill that convicts nobody the next one convicts when it comes before
    the request is through, p = 0.2 of the time; so the rate r of convictions is p (1 - r)."""
    kills = 20_000
    assert losses(kills, 1, [1.0], 5.0) / kills == pytest.approx(0.2 / 1.2, rel=0.1)


@pytest.mark.parametrize("clients", [4, 12, 64])
@pytest.mark.parametrize("workers", [1, 2])
def test_twenty_kills_that_leave_suspects_their_time_cost_next_to_nothing(clients: int, workers: int) -> None:
    """Requests of 0.2 to 0.8 seconds, 0 to 20 seconds between two kills."""
    assert losses(1000, clients, [0.2, 0.4, 0.8], 20.0, workers) / 50 < 0.5


def test_three_kills_lose_nobody_who_had_company() -> None:
    """Such a request dies with others, with some of them, and then twice alone."""
    assert [losses(3, 16, [5.0], 5.0, seed=seed) for seed in range(300)] == [0] * 300

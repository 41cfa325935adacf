"""How long a client that found the queue full should wait.

Work leaves at a rate that we can measure, so the places that will be free are given out in advance: each
refusal is told the time of the next unpromised one. Clients that obey come back one after the other instead
of all at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

WINDOW_SECONDS = 30.0
UNKNOWN_RATE_SECONDS = 5.0
LEAST_SECONDS = 1.0
MOST_SECONDS = 60.0


def within_reason(seconds: float) -> float:
    """What a client may be told."""
    return min(max(seconds, LEAST_SECONDS), MOST_SECONDS)


def expected(ends: Sequence[float], places: int = 1) -> float:
    """When so many places will be free, of jobs that are expected to leave in `ends` seconds."""
    return within_reason(sorted(ends)[:places][-1] if ends else UNKNOWN_RATE_SECONDS)


class Throughput:
    """Places that came free lately, and the promises made on them. All times are seconds of one monotonic clock, whose
    time at the start is `now`.

    The rate is measured only while at least half of the places are taken: how much leaves an idle server says nothing
    about how much can.
    """

    def __init__(self, now: float) -> None:
        self._finished: deque[float] = deque(maxlen=4096)  # by the clock that stands still in idle times
        self._began = now
        self._idle_since: float | None = now
        self._idle_seconds = 0.0
        self._promised_until = 0.0

    def taken(self, in_flight: int, places: int, now: float) -> None:
        """So many of the places are taken from now on."""
        loaded = 2 * in_flight >= places
        if loaded and self._idle_since is not None:
            self._idle_seconds += now - self._idle_since
            self._idle_since = None
        elif not loaded and self._idle_since is None:
            self._idle_since = now

    def finished(self, now: float) -> None:
        """One place has come free."""
        if self._idle_since is None:
            self._finished.append(self._clock(now))

    def per_second(self, now: float) -> float | None:
        """Places that came free a second, lately; None when fewer than two did."""
        clock = self._clock(now)
        since = max(clock - WINDOW_SECONDS, self._began)
        while self._finished and self._finished[0] <= since:
            self._finished.popleft()
        if len(self._finished) < 2:
            return None
        return len(self._finished) / (clock - since)

    def retry_after_seconds(
        self, in_flight: int, now: float, places: int = 1, ends: Callable[[], Sequence[float]] = tuple
    ) -> float:
        """When to try again for so many places: when the next that nobody was promised come free, at most the time in
        which all `in_flight` jobs will have left, within 1 to 60 seconds. While no rate is known, `ends` is asked in
        how many seconds jobs are expected to leave."""
        rate = self.per_second(now)
        if rate is None:
            return expected(ends(), places)
        self._promised_until = min(max(self._promised_until, now) + places / rate, now + in_flight / rate)
        return within_reason(self._promised_until - now)

    def _clock(self, now: float) -> float:
        return (now if self._idle_since is None else self._idle_since) - self._idle_seconds

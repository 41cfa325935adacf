"""How long a client that found the queue full should wait.

Work leaves at a rate that we can measure, so the places that will be free are given out in advance: each
refusal is told the time of the next unpromised one. Clients that obey come back one after the other instead
of all at once.
"""

from __future__ import annotations

from collections import deque

WINDOW_SECONDS = 30.0
UNKNOWN_RATE_SECONDS = 5.0
LEAST_SECONDS = 1.0
MOST_SECONDS = 60.0


class Throughput:
    """Answers of the last half minute, and the promises made on them. All times are seconds of one monotonic
    clock."""

    def __init__(self) -> None:
        self._finished: deque[float] = deque(maxlen=4096)
        self._promised_until = 0.0

    def finished(self, now: float) -> None:
        """One job has left."""
        self._finished.append(now)

    def per_second(self, now: float) -> float | None:
        """Jobs that left a second, lately; None when fewer than two did."""
        while self._finished and now - self._finished[0] > WINDOW_SECONDS:
            self._finished.popleft()
        if len(self._finished) < 2 or now <= self._finished[0]:
            return None
        return (len(self._finished) - 1) / (now - self._finished[0])

    def retry_after_seconds(self, in_flight: int, now: float) -> float:
        """When to try again: the next place that nobody was promised, at most the time in which all
        `in_flight` jobs will have left, within 1 to 60 seconds."""
        rate = self.per_second(now)
        if rate is None:
            return UNKNOWN_RATE_SECONDS
        self._promised_until = min(max(self._promised_until, now) + 1.0 / rate, now + in_flight / rate)
        return min(max(self._promised_until - now, LEAST_SECONDS), MOST_SECONDS)

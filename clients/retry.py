"""When to ask again. A generation has no side effects, so any request may be repeated.

The server says how long to wait (`Retry-After`) and may forbid or ask for a retry (`x-should-retry`). Without word from
it the wait doubles each time, with jitter so that many clients do not come back together.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

RETRYABLE = frozenset({408, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """At most `retries` repeats. A wait is at most `max_wait_seconds`: when the server asks for a longer one, its error
    is raised at once and carries `retry_after`."""

    retries: int = 2
    first_wait_seconds: float = 0.5
    max_wait_seconds: float = 30.0

    def wait(self, attempt: int, status: int | None, headers: Mapping[str, str]) -> float | None:
        """Seconds to wait before attempt + 1 (attempts count from 0), or None to give up. `status` None: no answer."""
        if attempt >= self.retries or not sendable_again(status, headers):
            return None
        asked = retry_after(headers)
        if asked is not None:
            return asked if asked <= self.max_wait_seconds else None
        return self.backoff(attempt)

    def backoff(self, attempt: int) -> float:
        """Seconds to wait after so many attempts where the server does not say."""
        doubled = min(self.first_wait_seconds * 2.0 ** min(attempt, 60), self.max_wait_seconds)
        return doubled * random.uniform(0.75, 1.0)


def sendable_again(status: int | None, headers: Mapping[str, str]) -> bool:
    """Whether a request that failed so may be sent again; `status` None: no answer."""
    word = headers.get("x-should-retry", "").lower()
    return word != "false" and (status is None or status in RETRYABLE or word == "true")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The `Retry-After` header in seconds (a number, or an HTTP date); None without a sensible one."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return max(seconds, 0.0) if seconds < float("inf") else None

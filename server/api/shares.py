"""What the owner of one API key may have in flight, where the settings bound it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from server.api.middleware import key_holder
from server.errors import InvalidRequest, KeyLimit
from server.front.admission import expected
from server.settings import Settings


class Shares:
    """Requests and trajectories in flight, by the fingerprint of the key. `ends` tells in how many seconds jobs will
    end, for those who are refused."""

    def __init__(self, settings: Settings, ends: Callable[[], list[float]]) -> None:
        self._limits = {"requests": settings.max_key_requests, "trajectories": settings.max_key_trajectories}
        self._ends = ends
        self._held: dict[str, Counter[str]] = {}

    @contextmanager
    def taken(self, trajectories: int = 0) -> Iterator[None]:
        """One request of so many trajectories is in flight meanwhile. Raises KeyLimit when that is more than the
        present request's key may have, InvalidRequest when it will always be."""
        holder = key_holder.get()
        if holder is None or not any(self._limits.values()):
            yield
            return
        wanted = Counter(requests=1, trajectories=trajectories)
        held = self._held.setdefault(holder, Counter())
        for what, limit in self._limits.items():
            if limit is None or held[what] + wanted[what] <= limit:
                continue
            if wanted[what] > limit:
                message = f"`best_of` x prompts is {trajectories}; an API key may have {limit} in flight"
                raise InvalidRequest(message, "best_of")
            message = f"this API key has {held[what]} {what} in flight; the limit is {limit} (max_key_{what})"
            raise KeyLimit(message, retry_after=expected(self._ends()))
        held.update(wanted)
        try:
            yield
        finally:
            held.subtract(wanted)
            if not held["requests"]:
                del self._held[holder]

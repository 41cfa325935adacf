"""One outside scorer, as the server asks it: so many calls at a time, made again when they fail, and none for a while
after many have failed."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from server.errors import ScorerFailed, ScorerRefused, ScorerUnavailable
from server.scorers.calls import DOWN, FINAL, CallFailed, Metadata, Pair, Reason
from server.scorers.functions import Function
from server.scorers.servers import Server
from server.wire.config import OutsideScorer
from server.wire.stats import Distribution

logger = logging.getLogger(__name__)

FAILURES_TO_OPEN = 5
OPEN_SECONDS = 10.0
BACKOFF_SECONDS = 0.1  # before the second call; doubled each time
MAX_BACKOFF_SECONDS = 5.0


@dataclass(slots=True)
class Breaker:
    """Open after FAILURES_TO_OPEN calls in a row for which the scorer was down. Every OPEN_SECONDS one more may see
    whether it is there again. All times are seconds of one monotonic clock."""

    failures: int = 0
    _until: float = 0.0

    @property
    def open(self) -> bool:
        """Whether no call is made, but for the one that tries."""
        return self.failures >= FAILURES_TO_OPEN

    def shut(self, now: float) -> bool:
        """Whether a call would not be made now."""
        return self.open and now < self._until

    def lets(self, now: float) -> bool:
        """Whether a call may be made. One that may try keeps the others waiting meanwhile."""
        if self.shut(now):
            return False
        if self.open:
            self._until = now + OPEN_SECONDS
        return True

    def heard(self, now: float, *, down: bool) -> None:
        """The scorer was down for a call, or it answered, whatever it said."""
        self.failures = self.failures + 1 if down else 0
        self._until = now + OPEN_SECONDS


@dataclass(slots=True)
class ScorerStats:
    """Sums for the metrics: requests, the texts in them, calls made again, calls that failed by reason ("open": that
    were not made), and the seconds that answered calls took."""

    requests: int = 0
    texts: int = 0
    retries: int = 0
    failures: Counter[Reason | str] = field(default_factory=Counter)
    seconds: Distribution = field(default_factory=Distribution)


class Scorer:
    """All methods belong to the event loop's thread."""

    def __init__(self, scorer: OutsideScorer) -> None:
        self.name, self.kind = scorer.name, scorer.kind
        self.stats = ScorerStats()
        self.breaker = Breaker()
        self._retries, self._patience = scorer.retries, scorer.timeout_seconds
        self._target: Function | Server = Function(scorer) if scorer.kind == "python" else Server(scorer)
        self._places = asyncio.Semaphore(scorer.calls)
        self._calls: set[asyncio.Task[list[float]]] = set()

    async def start(self) -> None:
        """Raises ConfigurationError when the scorer cannot be asked as it is set."""
        await self._target.start()

    async def close(self) -> None:
        """Let go of processes and connections."""
        for call in self._calls:
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)
        await self._target.close()

    def check(self) -> None:
        """Raises ScorerUnavailable while no call would be made."""
        if self.breaker.shut(time.monotonic()):
            raise self._left_alone()

    async def score(self, pairs: Sequence[Pair], metadata: Metadata) -> list[float]:
        """A score for each pair, in order. Raises ScorerFailed and ScorerUnavailable."""
        self.stats.requests += 1
        self.stats.texts += len(pairs)
        scores: list[float] = []
        try:
            for batch in self._target.batches(pairs):
                scores += await self._persist(batch, metadata)
        except CallFailed as error:
            logger.warning("scorer %s %s", self.name, error.message, extra={"cause": repr(error.__cause__)})
            kind = ScorerRefused if error.reason in FINAL else ScorerFailed
            raise kind(f"the scorer {self.name} {error.message}") from error
        return scores

    async def _persist(self, batch: Sequence[Pair], metadata: Metadata) -> list[float]:
        """One call, and more when it fails. Raises CallFailed, and ScorerUnavailable where none was made."""
        pause, failed = BACKOFF_SECONDS, None
        for left in range(self._retries, -1, -1):
            try:
                return await self._call(batch, metadata)
            except ScorerUnavailable as error:
                raise failed or error from None
            except CallFailed as error:
                if not left or error.reason in FINAL:
                    raise
                failed = error
            self.stats.retries += 1
            wanted = min(failed.retry_after, self._patience)
            await asyncio.sleep(max(wanted, pause * random.uniform(0.5, 1.0)))
            pause = min(2 * pause, MAX_BACKOFF_SECONDS)
        raise AssertionError("the last call returns or raises")

    async def _call(self, batch: Sequence[Pair], metadata: Metadata) -> list[float]:
        """One call. Once begun it goes on to its end, whether or not who asked has left: only so is it known that a
        scorer hangs whose callers have less time than its calls, and a function's process, which may have loaded much,
        is not lost to a client that leaves. Raises CallFailed, ScorerUnavailable."""
        await self._places.acquire()
        if not self.breaker.lets(time.monotonic()):
            self._places.release()
            self.stats.failures["open"] += 1
            raise self._left_alone()
        call = asyncio.create_task(self._counted(batch, metadata), name=f"call of {self.name}")
        self._calls.add(call)

        def ended(_: object) -> None:
            self._calls.discard(call)
            self._places.release()
            if not call.cancelled():
                call.exception()  # there may be nobody else to take it

        call.add_done_callback(ended)
        return await asyncio.shield(call)

    def _left_alone(self) -> ScorerUnavailable:
        return ScorerUnavailable(f"the scorer {self.name} has failed too often and is left alone for a while")

    async def _counted(self, batch: Sequence[Pair], metadata: Metadata) -> list[float]:
        began = time.monotonic()
        try:
            scores = await self._target.ask(batch, metadata)
        except CallFailed as error:
            self.stats.failures[error.reason] += 1
            self.breaker.heard(time.monotonic(), down=error.reason in DOWN)
            raise
        self.stats.seconds.add(time.monotonic() - began)
        self.breaker.heard(time.monotonic(), down=False)
        return scores

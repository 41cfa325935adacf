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

from server.errors import ScorerFailed, ScorerUnavailable
from server.scorers.calls import DOWN, FINAL, CallFailed, Metadata, Pair, Reason, Target
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
    """Open after FAILURES_TO_OPEN requests in a row for which the scorer was down. Every OPEN_SECONDS one more may see
    whether it is there again. All times are seconds of one monotonic clock."""

    failures: int = 0
    _until: float = 0.0

    @property
    def open(self) -> bool:
        """Whether requests are refused, but for the one that tries."""
        return self.failures >= FAILURES_TO_OPEN

    def lets(self, now: float) -> bool:
        """Whether a request may go on. One that may try keeps the others waiting meanwhile."""
        if not self.open:
            return True
        if now < self._until:
            return False
        self._until = now + OPEN_SECONDS
        return True

    def heard(self, now: float, *, down: bool) -> None:
        """The scorer was down for a request, or it answered, whatever it said."""
        self.failures = self.failures + 1 if down else 0
        self._until = now + OPEN_SECONDS


@dataclass(slots=True)
class ScorerStats:
    """Sums for the metrics: requests, the texts in them, calls made again, requests that failed by reason ("open": by
    the breaker), and the seconds that answered calls took."""

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
        self._target: Target = Function(scorer) if scorer.kind == "python" else Server(scorer)
        self._places = asyncio.Semaphore(scorer.calls)

    async def start(self) -> None:
        """Raises ConfigurationError when the scorer cannot be asked as it is set."""
        await self._target.start()

    async def close(self) -> None:
        """Let go of processes and connections."""
        await self._target.close()

    async def score(self, pairs: Sequence[Pair], metadata: Metadata) -> list[float]:
        """A score for each pair, in order. Raises ScorerFailed and ScorerUnavailable."""
        self.stats.requests += 1
        self.stats.texts += len(pairs)
        scores: list[float] = []
        try:
            for batch in self._target.batches(pairs):
                scores += await self._persist(batch, metadata)
        except CallFailed as error:
            self.stats.failures[error.reason] += 1
            self.breaker.heard(time.monotonic(), down=error.reason in DOWN)
            logger.warning("scorer %s %s", self.name, error.message, extra={"cause": repr(error.__cause__)})
            raise ScorerFailed(f"the scorer {self.name} {error.message}") from error
        return scores

    async def _persist(self, batch: Sequence[Pair], metadata: Metadata) -> list[float]:
        """One call, and more when it fails. Raises CallFailed, ScorerUnavailable."""
        pause = BACKOFF_SECONDS
        for left in range(self._retries, -1, -1):
            try:
                async with self._places:
                    self._check()
                    began = time.monotonic()
                    scores = await self._target.ask(batch, metadata)
                    now = time.monotonic()
                    self.stats.seconds.add(now - began)
                    self.breaker.heard(now, down=False)
                    return scores
            except CallFailed as error:
                if not left or error.reason in FINAL:
                    raise
                wanted = min(error.retry_after, self._patience)
            self.stats.retries += 1
            await asyncio.sleep(max(wanted, pause * random.uniform(0.5, 1.0)))
            pause = min(2 * pause, MAX_BACKOFF_SECONDS)
        raise AssertionError("the last call returns or raises")

    def _check(self) -> None:
        """Raises ScorerUnavailable while the breaker is open."""
        if not self.breaker.lets(time.monotonic()):
            self.stats.failures["open"] += 1
            raise ScorerUnavailable(f"the scorer {self.name} has failed too often and is left alone for a while")

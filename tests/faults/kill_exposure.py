"""What kills cost by arithmetic: how many requests lose two workers, from the run's own numbers.

After a worker's death the requests that it had been computing are *suspects*: they run again alone, one after the other
on each worker (`server/engine/dispatch.py`). A kill in that time is the second death of the one that is running, which
is answered with 503, and of no other; a kill at any other time costs nothing. So with

    n     suspects after a kill,
    tau   seconds that a suspect runs alone,
    R     workers, one of which is killed,
    gap   seconds: the next kill comes at a moment uniform in [0, gap] after the worker was ready again,

the next kill costs one request with probability p = min(1, n tau / (R gap)), and never more than one. Over a run that
is sum(p) requests, give or take sqrt(sum(p (1 - p))). With 8 suspects of 0.8 s each and a gap of 20 s every third kill
must cost a request, whatever the server does, as long as a second death is answered with a 503 and nobody is put in
danger beside a suspect. As a share of all requests that is 2 n tau / (rate gap^2), which says more about the gap than
about the server.

The log tells n, and for how long how many suspects ran; their mean time is tau (those that were killed count in full,
which makes it a little too small and the expectation strict). What the server can get wrong is tau, so that is checked
against what the same requests take alone on the undisturbed server. Who takes longer is more often running when a
worker dies, so the mean of those times L is weighted with themselves: sum(L^2) / sum(L).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

THROUGH = "no request has to run alone any more"


@dataclass(frozen=True)
class Death:
    """A death of a worker that had requests: when (seconds since the epoch), the suspects `before` it and after it,
    and those whose second death it was."""

    at: float
    before: int
    suspects: int
    convicted: int


@dataclass
class Exposure:
    """What a log tells. `seconds`: how long there were suspects and a worker to run them. `ran`: suspects that ran to
    their end or to their second death."""

    deaths: list[Death] = field(default_factory=list)
    seconds: float = 0.0
    ran: int = 0

    @property
    def convicted(self) -> int:
        """Requests that died twice."""
        return sum(death.convicted for death in self.deaths)

    @property
    def seconds_a_suspect(self) -> float:
        """Mean time for which a suspect ran; nan of none."""
        return self.seconds / self.ran if self.ran else math.nan


def exposure(log: Iterable[str]) -> Exposure:
    """Read the server's log (JSON lines)."""
    found = Exposure()
    ready: set[str] = set()
    suspects = 0
    since: float | None = None  # when suspects could run
    for line in log:
        if not line.startswith("{"):
            continue
        record = json.loads(line)
        message, at = record["message"], datetime.fromisoformat(record["time"]).timestamp()
        worker = re.match(r"worker \d+", message)
        if worker and message.endswith(") is ready"):
            ready.add(worker[0])
        elif worker and " ended with " in message:
            ready.discard(worker[0])
            if since is not None and not ready:
                found.seconds += at - since
                since = None
        elif "convicted" in record:
            death = Death(at, record["before"], record["suspects"], record["convicted"])
            found.deaths.append(death)
            found.ran += suspects - death.before + death.convicted
            suspects = death.suspects
        elif message == THROUGH:
            found.ran += suspects
            suspects = 0
        if since is not None and not suspects:
            found.seconds += at - since
            since = None
        elif since is None and suspects and ready:
            since = at
    return found


def seconds_alone(latencies: Sequence[float]) -> float:
    """What tau should be, given the seconds that each kind of request takes alone."""
    return sum(latency**2 for latency in latencies) / sum(latencies)


def expected_losses(suspects: Iterable[int], tau: float, gap: float, workers: int = 1) -> tuple[float, float]:
    """Mean and standard deviation of the number of requests that lose two workers, given the suspects that there were
    after each kill that another one followed."""
    chances = [min(1.0, count * tau / (workers * gap)) for count in suspects]
    return sum(chances), math.sqrt(sum(p * (1.0 - p) for p in chances))

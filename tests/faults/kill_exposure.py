"""What kills cost by arithmetic: how many requests lose two workers, from the run's own numbers.

After a worker's death the requests that it had been computing are *suspects*: they run again alone, one after the other
on each worker (`server/front/dispatch.py`). A kill in that time is the second death of the one that is running, which
is answered with 503, and of no other; a kill at any other time costs nothing. So with

    n     suspects after a kill,
    tau   seconds that a suspect runs alone,
    R     workers, one of which is killed,
    gap   seconds: the next kill comes at a moment uniform in [0, gap] after the worker was ready again,

the next kill costs one request with probability p = min(1, n tau / (R gap)), and never more than one. Over a run that
is sum(p) requests, give or take sqrt(sum(p (1 - p))); with several workers less, since suspects run on the others while
the killed one's successor starts. With 8 suspects of 0.8 s each and a gap of 20 s every third kill must cost a request,
whatever the server does, as long as a second death is answered with a 503 and nobody is put in danger beside a suspect.
As a share of all requests that is 2 n tau / (rate gap^2), which says more about the gap than about the server.

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

BEGINS = re.compile(r"request (\S+) runs alone on (worker \d+)")
ENDS = re.compile(r"request (\S+) has run alone")
WORKER_ENDS = re.compile(r"(worker \d+) ended with")


@dataclass
class Exposure:
    """What a log tells: the `suspects` that there were after each death of a worker that had requests, how many each
    death `convicted`, for how many `seconds` suspects ran, and how many of them `ran` to an end, theirs or their second
    worker's."""

    suspects: list[int] = field(default_factory=list)
    convicted: list[int] = field(default_factory=list)
    seconds: float = 0.0
    ran: int = 0

    @property
    def seconds_a_suspect(self) -> float:
        """Mean time for which a suspect ran; nan of none."""
        return self.seconds / self.ran if self.ran else math.nan


def exposure(log: Iterable[str]) -> Exposure:
    """Read the server's log (JSON lines)."""
    found = Exposure()
    alone: dict[str, tuple[str, float]] = {}  # the request that each worker runs alone, and since when
    for line in log:
        if not line.startswith("{"):
            continue
        record = json.loads(line)
        message, at = record["message"], datetime.fromisoformat(record["time"]).timestamp()
        if begins := BEGINS.match(message):
            alone[begins[2]] = begins[1], at
        elif ends := ENDS.match(message):
            (worker,) = (worker for worker, (request, _) in alone.items() if request == ends[1])
            found.seconds += at - alone.pop(worker)[1]
            found.ran += 1
        elif (death := WORKER_ENDS.match(message)) and death[1] in alone:
            found.seconds += at - alone.pop(death[1])[1]
        elif "convicted" in record:
            found.suspects.append(record["suspects"])
            found.convicted.append(len(record["convicted"]))
            found.ran += len(record["convicted"])
    return found


def seconds_alone(latencies: Sequence[float]) -> float:
    """What tau should be, given the seconds that each kind of request takes alone."""
    return sum(latency**2 for latency in latencies) / sum(latencies)


def expected_losses(suspects: Iterable[int], tau: float, gap: float, workers: int = 1) -> tuple[float, float]:
    """Mean and standard deviation of the number of requests that lose two workers, given the suspects that there were
    after each kill that another one followed."""
    chances = [min(1.0, count * tau / (workers * gap)) for count in suspects]
    return sum(chances), math.sqrt(sum(p * (1.0 - p) for p in chances))

"""One of the engine's workers, as the engine sees it: its supervisor, what it loaded, and what it has counted.

The worker behind it dies and is replaced; the replica, its number and its sums stay.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from server.front.supervisor import Spare, Supervisor
from server.types import EngineInfo
from server.wire.config import EngineConfig
from server.wire.messages import Event, Heartbeat
from server.wire.stats import RunnerStats


class Owner(Protocol):
    """The engine. All are called on the event loop and must not block."""

    def on_ready(self, replica: Replica) -> None:
        """Its worker can take work; `replica.info` says what it loaded."""

    def on_event(self, replica: Replica, event: Event) -> None:
        """Its worker said something about a job."""

    def on_death(self, replica: Replica) -> None:
        """Its worker, which was ready, is gone with all that it held."""

    def on_failed_start(self, replica: Replica) -> None:
        """The next worker did not get ready."""


class Replica:
    """Worker number `rank` of the engine, and its successors. The `Listener` of its supervisor."""

    def __init__(self, rank: int, config: EngineConfig, owner: Owner, spare: Spare | None) -> None:
        self.rank = rank
        self.supervisor = Supervisor(config, replace(config.worker, rank=rank), self, spare)
        self.info: EngineInfo | None = None
        self._owner = owner
        self._past = RunnerStats()  # of workers that are no more
        self._present = RunnerStats()

    @property
    def ready(self) -> bool:
        """Whether there is a worker that can take work."""
        return self.supervisor.ready

    @property
    def stats(self) -> RunnerStats:
        """Sums over all workers so far; gauges of the present one."""
        return self._past.plus(self._present)

    def on_ready(self, info: EngineInfo) -> None:
        """Pass on."""
        self.info = info
        self._owner.on_ready(self)

    def on_event(self, event: Event) -> None:
        """Keep heartbeats, pass on the rest."""
        if isinstance(event, Heartbeat):
            self._present = event.stats
        else:
            self._owner.on_event(self, event)

    def on_death(self) -> None:
        """Close the dead worker's account, pass on."""
        self._past = self._past.plus(replace(self._present, running=0, waiting=0))
        self._present = RunnerStats()
        self._owner.on_death(self)

    def on_failed_start(self) -> None:
        """Pass on."""
        self._owner.on_failed_start(self)

"""What the HTTP process remembers of a request in flight, so that a lost worker's share can run again unnoticed.

A job is seeded, so a second run draws the same tokens. Events that the reader has already been given are not given
twice; should the second run differ from the first (it may in low precision, when the batch around it differs), a reader
that already holds a part of the first gets an error rather than a spliced text.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

from server.front.judging import Judging
from server.wire.messages import Ask, Canvas, Event, Failed, Finished, Progress, Scored, Started

Answer = Finished | Failed | Scored

# A client that reads its canvases slower than they are made loses old ones past this many tokens.
CANVAS_BACKLOG_TOKENS = 2**18
CONVICTING_DEATHS = 2  # of workers that had this request and no other


@dataclass(slots=True, eq=False)
class Pending:
    """A job or score request without an answer, and the events on their way to its one reader; the answer is the last.

    `frame` is the message that hands it to a worker, `cost` an estimate of the work in it. `worker` is the number of
    the worker that has it, None while it waits for one; `begun` says that this worker has begun to compute for it,
    `begun_at` (`time.monotonic`) when a worker first had, and `begun_step` the steps that this worker had done then. A
    job takes `steps` of them, about. A batch's `priority` is above 0. `suspect`, `lone_deaths` and `losses` are
    explained in `front/dispatch`.
    `request_id` is that of the log. What a job's outside scorers say is `judging`'s; `parked` is the question that
    its worker waits for, and the asking is among `tasks`.
    """

    id: str
    frame: bytes
    is_job: bool = True
    cost: float = 1.0
    steps: int = 0
    priority: int = 0
    request_id: str | None = None
    worker: int | None = None
    begun: bool = False
    begun_at: float | None = None
    begun_step: int = 0
    suspect: bool = False
    lone_deaths: int = 0
    losses: int = 0
    judging: Judging | None = None
    parked: Ask | None = None
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    timer: asyncio.TimerHandle | None = None  # of the deadline
    _events: deque[Event] = field(default_factory=deque)
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)
    _canvas_tokens: int = 0  # among `_events`
    _started: bool = False
    _progress: dict[tuple[int, int], list[tuple[int, int]]] = field(default_factory=dict)
    _canvases: set[tuple[int, int, int | None]] = field(default_factory=set)  # given: trajectory, step, ancestor

    @property
    def convicted(self) -> bool:
        """Whether it kills its workers, as far as can be known."""
        return self.lone_deaths >= CONVICTING_DEATHS

    def deliver(self, event: Event) -> bool:
        """Hand an event to the reader unless it already has it. Returns False when a second run contradicts
        what the reader was given; then nothing is delivered."""
        match event:
            case Started():
                if self._started:
                    return True
                self._started = True
            case Progress(trajectory=trajectory, step=step, revealed=revealed):
                if (given := self._progress.get((trajectory, step))) is not None:
                    return given == revealed
                self._progress[trajectory, step] = revealed
            case Canvas(trajectory=trajectory, step=step, ancestor=ancestor):
                if (trajectory, step, ancestor) in self._canvases:
                    return True
                self._canvases.add((trajectory, step, ancestor))
                self._make_room(len(event.token_ids))
        self._put(event)
        return True

    def close(self, answer: Answer) -> None:
        """Deliver the answer; nothing follows, and neither the deadline nor what scorers say matters any longer."""
        if self.timer is not None:
            self.timer.cancel()
        for task in self.tasks:
            task.cancel()
        self._put(answer)

    async def next_event(self) -> Event:
        """The next event, in order."""
        while not self._events:
            self._arrived.clear()
            await self._arrived.wait()
        event = self._events.popleft()
        if isinstance(event, Canvas):
            self._canvas_tokens -= len(event.token_ids)
        return event

    def _put(self, event: Event) -> None:
        self._events.append(event)
        self._arrived.set()

    def _make_room(self, tokens: int) -> None:
        """Forget old canvases for the sake of a new one of so many tokens, when the reader is too slow."""
        self._canvas_tokens += tokens
        while self._canvas_tokens > CANVAS_BACKLOG_TOKENS:
            oldest = next((event for event in self._events if isinstance(event, Canvas)), None)
            if oldest is None:
                return
            self._events.remove(oldest)
            self._canvas_tokens -= len(oldest.token_ids)

"""What the HTTP process remembers of work in flight, so that a lost worker's share can run again unnoticed.

A job is seeded, so a second run draws the same tokens. Events that the client has already been given are not
given twice; should the second run differ from the first (it may in low precision, when the batch around it
differs), a client that already holds a part of the first gets an error rather than a spliced text.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

from server.wire.messages import (
    Canvas,
    Event,
    Failed,
    Finished,
    Progress,
    Scored,
    Started,
)

Answer = Finished | Failed | Scored

# A client that reads its canvases slower than they are made loses old ones past this many tokens.
CANVAS_BACKLOG_TOKENS = 2**18


class Mailbox:
    """Events on their way from the worker to one reader. The answer is the last."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._arrived = asyncio.Event()
        self._canvas_tokens = 0

    def put(self, event: Event) -> None:
        """Deliver. Old canvases make room for new ones when the reader is too slow."""
        self._events.append(event)
        self._arrived.set()
        if not isinstance(event, Canvas):
            return
        self._canvas_tokens += len(event.token_ids)
        while self._canvas_tokens > CANVAS_BACKLOG_TOKENS:
            oldest = next((held for held in self._events if isinstance(held, Canvas)), event)
            if oldest is event:
                break
            self._events.remove(oldest)
            self._canvas_tokens -= len(oldest.token_ids)

    async def get(self) -> Event:
        """The next event, in order."""
        while not self._events:
            self._arrived.clear()
            await self._arrived.wait()
        event = self._events.popleft()
        if isinstance(event, Canvas):
            self._canvas_tokens -= len(event.token_ids)
        return event


@dataclass(slots=True)
class Pending:
    """A job or score request without an answer. `frame` is the message that hands it to a worker, `cost` an
    estimate of the work in it.

    `worker` is the number of the worker that has it, None while it waits for one; `begun` says that that worker has
    begun to compute for it; `begun_at` (`time.monotonic`) when a worker first had. `deaths` counts the workers that
    died while computing for it, `losses` those that died with it in their queue.
    """

    id: str
    frame: bytes
    is_job: bool = True
    deadline: float | None = None
    cost: float = 1.0
    mailbox: Mailbox = field(default_factory=Mailbox)
    worker: int | None = None
    begun: bool = False
    begun_at: float | None = None
    deaths: int = 0
    losses: int = 0
    timer: asyncio.TimerHandle | None = None
    _started: bool = False
    _progress: dict[tuple[int, int], list[tuple[int, int]]] = field(default_factory=dict)
    _canvases: dict[int, int] = field(default_factory=dict)  # trajectory -> last step given

    def deliver(self, event: Event) -> bool:
        """Hand an event to the reader unless it already has it. Returns False when a second run contradicts
        what the reader was given; then nothing is delivered."""
        match event:
            case Started():
                if self._started:
                    return True
                self._started = True
            case Progress(trajectory=trajectory, step=step, revealed=revealed):
                given = self._progress.get((trajectory, step))
                if given is not None:
                    return given == revealed
                self._progress[trajectory, step] = revealed
            case Canvas(trajectory=trajectory, step=step):
                if step <= self._canvases.get(trajectory, -1):
                    return True
                self._canvases[trajectory] = step
            case _:
                pass
        self.mailbox.put(event)
        return True

    def close(self, answer: Answer) -> None:
        """Deliver the answer; nothing follows."""
        self.cancel_timer()
        self.mailbox.put(answer)

    def cancel_timer(self) -> None:
        """The deadline no longer matters."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

"""One HTTP/1.1 connection: uvicorn's, with a bound on each thing that uvicorn lets a peer do without one.

| a peer that                               | is stopped by                                                        |
|-------------------------------------------|----------------------------------------------------------------------|
| sends a header or a body too slowly       | one timer, started anew for each of them (`_watch_arrival`)          |
| reads nothing of what waits for it        | the kernel: `TCP_USER_TIMEOUT` ends the connection (Linux)           |
| cuts a body into ever more chunks         | `_Parser`, which counts them                                         |
| sends requests far ahead, or leaves while | reading goes on while an answer is made, up to `MAX_AHEAD_BYTES`     |
| one is answered                           |                                                                      |
| opens connection after connection         | `Room`; uvicorn's `limit_concurrency` would refuse probes as well    |

What is not HTTP gets the error envelope, like every other refusal.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import h11
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from server.api.errors import envelope, headers
from server.errors import HeadersTooLarge, InvalidRequest, RequestError, RequestTimeout, TooManyConnections

access = logging.getLogger("server.access")

MAX_CHUNKS = 16_384  # of one body; parsing one costs about as much as parsing a small request
MAX_AHEAD_BYTES = 65_536  # of requests sent before the present one is answered
LINGER_SECONDS = 1.0  # between the last word and the end of a connection
EXTRA_CONNECTIONS = 32  # past the limit, each for one probe or one refusal
EXTRA_SECONDS = 2.0  # which those have to send their request
ARRIVED = (h11.DONE, h11.MUST_CLOSE, h11.MIGHT_SWITCH_PROTOCOL)  # type: ignore[attr-defined]
"""States of a peer that has sent its whole request; the last with an offer to go on in another protocol."""


@dataclass(frozen=True)
class Room:
    """What all connections share. `connections` of them may be open; on the next `EXTRA_CONNECTIONS` only `probes`
    (paths) are served, and any other request gets a 503; those after them are cut off without a word. A client may be
    silent for `seconds` where the server waits for it. `refused` hears of every refusal."""

    connections: int
    seconds: float
    probes: frozenset[str]
    refused: Callable[[RequestError], None]


class Connection(H11Protocol):
    """A connection in its `room`."""

    room: Room

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn = _Parser(h11.SERVER, config.h11_max_incomplete_event_size or 65_536)
        self._seconds = self.room.seconds
        self._awaited: object = None  # the peer's state in which something must arrive, and
        self._arrival: asyncio.TimerHandle | None = None  # until when
        self._lingering = False  # what still arrives is thrown away

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take it, if there is room."""
        super().connection_made(transport)
        excess = len(self.connections) - self.room.connections
        if excess > EXTRA_CONNECTIONS:
            transport.abort()
            return
        if excess > 0:
            self.app = self._without_room(self.app)
            self._seconds = min(self._seconds, EXTRA_SECONDS)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            milliseconds = max(1, int(1000 * self.room.seconds))
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        self._watch_arrival()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        super().connection_lost(exc)
        for timer in (self._arrival, self.timeout_keep_alive_task):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Parse, unless the last word has been said."""
        if not self._lingering:
            super().data_received(data)

    def handle_events(self) -> None:
        """Go through what has arrived; called when there is more of it, and when the next request's turn has come."""
        super().handle_events()
        if self.transport.is_closing() or self._lingering:
            return
        self._watch_arrival()
        if self.conn.their_state in ARRIVED and self.flow.read_paused:
            self.flow.resume_reading()  # or we would not see the peer leave
            if len(self.conn.trailing_data[0]) > MAX_AHEAD_BYTES:
                self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """uvicorn's hook for bytes that are not HTTP."""
        error = sys.exc_info()[1]
        too_large = isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431
        refusal = HeadersTooLarge("the header is too large") if too_large else InvalidRequest("this is not HTTP/1.1")
        self._refuse(refusal)

    def _unsupported_upgrade_warning(self) -> None:
        """`Upgrade` is an offer (JDK's client makes it with every request, for h2c), and it may be left alone."""

    def _watch_arrival(self) -> None:
        """Time what is arriving: a header, a body, or nothing (while answering, or idle between two requests)."""
        state = self.conn.their_state
        header = state is h11.IDLE and self.timeout_keep_alive_task is None
        awaited = state if header or state is h11.SEND_BODY else None
        if awaited is self._awaited:
            return
        self._awaited = awaited
        if self._arrival is not None:
            self._arrival.cancel()
        self._arrival = None if awaited is None else self.loop.call_later(self._seconds, self._late)

    def _late(self) -> None:
        """The request has not arrived in time. A peer that sent nothing at all is told nothing."""
        if not self.conn.trailing_data[0] and self.conn.our_state is h11.IDLE:
            self.transport.close()
        else:
            self._refuse(RequestTimeout(f"the request did not arrive within {self._seconds:g} seconds"))

    def _without_room(self, app: ASGIApp) -> ASGIApp:
        """`app` on a connection past the limit: probes only, and only one."""

        async def probes(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["path"] in self.room.probes:
                self.cycle.keep_alive = False
                await app(scope, receive, send)
            else:
                self._refuse(TooManyConnections("the server has no room for another connection"))

        return probes

    def _refuse(self, error: RequestError) -> None:
        """Answer with the error, if there is still a place for an answer, and close."""
        body, identity = json.dumps(envelope(error)).encode(), uuid.uuid4().hex
        answering = self.cycle is not None and not self.cycle.response_complete
        fields = {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "X-Request-Id": identity,
            "Connection": "close",
            **headers(error),
        }
        sent = b"" if answering and self.cycle.scope["method"] == "HEAD" else body
        with contextlib.suppress(h11.LocalProtocolError):
            response = h11.Response(status_code=error.status, headers=list(fields.items()), reason=b"")
            for event in (response, h11.Data(data=sent), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
            self.room.refused(error)
            told = {"request_id": identity, "status": error.status, "error_code": error.code}
            access.info("refused a connection", extra=told)
            if self.cycle is not None:  # the application may be about to answer, too; to it the client has gone
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            self._linger()
            return
        self.transport.close()

    def _linger(self) -> None:
        """Close, but not at once: a peer that still sends would get a reset, and might lose the answer with it."""
        if self.conn.their_state in ARRIVED or not self.transport.can_write_eof():  # nothing is unread, or it is TLS
            self.transport.close()
            return
        self._lingering = True
        self.transport.write_eof()
        if self._arrival is not None:
            self._arrival.cancel()
        self._arrival = self.loop.call_later(LINGER_SECONDS, self.transport.close)


class _Parser(h11.Connection):
    """h11, refusing bodies in more pieces than make sense."""

    _chunks = 0

    def next_event(self) -> Any:
        """The next event. Raises h11.RemoteProtocolError."""
        event = super().next_event()
        if isinstance(event, h11.Data) and event.chunk_start:
            self._chunks += 1
            if self._chunks > MAX_CHUNKS:
                raise h11.RemoteProtocolError("too many chunks")
        elif isinstance(event, h11.EndOfMessage):
            self._chunks = 0
        return event

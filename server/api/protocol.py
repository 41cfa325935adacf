"""One HTTP/1.1 connection: uvicorn's, with limits on time and on what a peer may leave lying about.

What uvicorn alone does without a limit, and this class with one: wait for the rest of a request's header or body; wait
for a peer that reads nothing of a finished answer; split a body into ever more chunks; buffer pipelined requests (and
not see that the peer left, because it reads no further). What is not HTTP gets the error envelope, too.

The number of connections is bounded as well (`Room`). uvicorn's `limit_concurrency` would refuse probes like anybody
else, so that an orchestrator restarts a server that is merely busy, and in plain text.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
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

MAX_CHUNKS = 16_384  # of one body; parsing one costs about as much as parsing a small request
MAX_AHEAD_BYTES = 65_536  # of requests sent before the present one is answered
LOOKS = 4  # at a peer that reads nothing, before it is given up
LINGER_SECONDS = 1.0  # between the last word and the end of a connection
GRACE_SECONDS = 2.0  # in which the application may answer by itself a body that does not arrive
EXTRA_CONNECTIONS = 32  # past the limit, each for one probe or one refusal
EXTRA_RECEIVE_SECONDS = 2.0


@dataclass(frozen=True)
class Room:
    """How many connections may be open. On the next `EXTRA_CONNECTIONS` only `probes` (paths) are served; any other
    request gets a 503, of which `refused` hears. Whoever comes after those is cut off without a word."""

    connections: int
    probes: frozenset[str]
    refused: Callable[[RequestError], None]


class Connection(H11Protocol):
    """`receive_seconds` bounds the arrival of a request's header, and again that of its body; `stalled_seconds` how
    long a peer may read nothing of what has been written for it; `room` how many connections there are."""

    room: Room
    receive_seconds = 30.0
    stalled_seconds = 60.0

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn = _Parser(h11.SERVER, config.h11_max_incomplete_event_size or 65_536)
        self._awaited: object = None  # the peer's state in which something must arrive, and
        self._arrival: asyncio.TimerHandle | None = None  # until when
        self._stall: asyncio.TimerHandle | None = None
        self._unread_bytes = 0  # at the last look
        self._stuck_looks = 0
        self._resumed = False  # writing, since the last look
        self._lingering = False  # what still arrives is thrown away

    # -- uvicorn's hooks -----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take it, if there is room, and start both clocks."""
        super().connection_made(transport)
        excess = len(self.connections) - self.room.connections
        if excess > EXTRA_CONNECTIONS:
            transport.abort()
            return
        if excess > 0:
            self.app = self._without_room(self.app)
            self.receive_seconds = min(self.receive_seconds, EXTRA_RECEIVE_SECONDS)
        self._watch_arrival()
        self._stall = self.loop.call_later(self.stalled_seconds / LOOKS, self._check_stall)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop them."""
        super().connection_lost(exc)
        for timer in (self._arrival, self._stall, self.timeout_keep_alive_task):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Parse, and see to the clocks."""
        if self._lingering:
            return
        super().data_received(data)
        if self.transport.is_closing() or self._lingering:
            return
        self._watch_arrival()
        if self.conn.their_state is h11.DONE and self.flow.read_paused:
            # Go on reading, or we would not see the peer leave.
            self.flow.resume_reading()
            if len(self.conn.trailing_data[0]) > MAX_AHEAD_BYTES:
                self.transport.abort()

    def resume_writing(self) -> None:
        """The peer reads."""
        super().resume_writing()
        self._resumed = True

    def on_response_complete(self) -> None:
        """The next request may have arrived already, or begun."""
        super().on_response_complete()
        if not self.transport.is_closing():
            self._watch_arrival()

    def send_400_response(self, msg: str) -> None:
        """Called for bytes that are not HTTP. While an answer is being written there is no place for another."""
        error = sys.exc_info()[1]
        too_large = isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431
        self._refuse(
            HeadersTooLarge("the header is too large") if too_large else InvalidRequest("this is not HTTP/1.1")
        )

    # -- the clocks ----------------------------------------------------------------------------------------------

    def _watch_arrival(self) -> None:
        """Time what is arriving: a header, a body, or nothing (while answering, or idle between two requests)."""
        state = self.conn.their_state
        awaited = None
        if state is h11.SEND_BODY or (state is h11.IDLE and self.timeout_keep_alive_task is None):
            awaited = state
        if awaited is self._awaited:
            return
        self._awaited = awaited
        if self._arrival is not None:
            self._arrival.cancel()
            self._arrival = None
        if awaited is not None:
            seconds = self.receive_seconds + (GRACE_SECONDS if awaited is h11.SEND_BODY else 0.0)
            self._arrival = self.loop.call_later(seconds, self._late)

    def _late(self) -> None:
        """The request has not arrived in time. Who sent nothing at all is told nothing."""
        if not self.conn.trailing_data[0] and self.conn.our_state is h11.IDLE:
            self.transport.close()
        else:
            self._refuse(RequestTimeout(f"the request did not arrive within {self.receive_seconds:g} seconds"))

    def _check_stall(self) -> None:
        """Give up a peer that has read nothing of what waits for it, look after look."""
        unread = self.transport.get_write_buffer_size()
        # Only while nothing is written does the same number of bytes mean that nothing was read.
        written = self.transport.is_closing() or self.cycle is None or self.cycle.response_complete
        held_up = self.flow.write_paused and not self._resumed
        stuck = unread > 0 and unread == self._unread_bytes and (written or held_up)
        self._stuck_looks = self._stuck_looks + 1 if stuck else 0
        if self._stuck_looks == LOOKS:
            # Not even the kernel shall keep what it has taken of the answer.
            sock = self.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()
            return
        self._unread_bytes, self._resumed = unread, False
        self._stall = self.loop.call_later(self.stalled_seconds / LOOKS, self._check_stall)

    # -- answers that no application gives -----------------------------------------------------------------------

    def _without_room(self, app: ASGIApp) -> ASGIApp:
        """`app` on a connection past the limit: probes only, and only one."""

        async def probes(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["path"] in self.room.probes:
                self.cycle.keep_alive = False
                await app(scope, receive, send)
                return
            error = TooManyConnections("the server has no room for another connection")
            self.room.refused(error)
            self._refuse(error)

        return probes

    def _refuse(self, error: RequestError) -> None:
        """Answer with the error if there is still a place for an answer, and close."""
        body = json.dumps(envelope(error)).encode()
        answering = self.cycle is not None and not self.cycle.response_complete
        sent = b"" if answering and self.cycle.scope["method"] == "HEAD" else body
        fields = {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "X-Request-Id": uuid.uuid4().hex,
            "Connection": "close",
            **headers(error),
        }
        with contextlib.suppress(h11.LocalProtocolError):
            response = h11.Response(status_code=error.status, headers=list(fields.items()), reason=b"")
            for event in (response, h11.Data(data=sent), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
            if self.cycle is not None:  # the application may be about to answer, too; to it the client has gone
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            self._linger()
            return
        self.transport.close()

    def _linger(self) -> None:
        """Close, but not at once: a peer that still sends would get a reset, and might lose the answer with it."""
        whole = self.conn.their_state in (h11.DONE, h11.MUST_CLOSE)  # the request has arrived; nothing is unread
        if whole or not self.transport.can_write_eof():  # TLS cannot
            self.transport.close()
            return
        self._lingering = True
        self.transport.write_eof()
        if self._arrival is not None:
            self._arrival.cancel()
        self._arrival = self.loop.call_later(LINGER_SECONDS, self.transport.close)


def connection_class(receive_seconds: float, stalled_seconds: float, room: Room) -> type[Connection]:
    """A `Connection` with these limits, as uvicorn's `http` option takes it."""
    limits = {"receive_seconds": receive_seconds, "stalled_seconds": stalled_seconds, "room": room}
    return type("Connection", (Connection,), limits)


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

"""What happens before and after every route, as plain ASGI: request ids, limits, API keys, the last catch.

No class here touches the body of a response or stands between a route and `http.disconnect`.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
import uuid
from contextvars import ContextVar

from opentelemetry import trace
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import error_response, unexpected
from server.api.metrics import Metrics
from server.errors import BodyTooLarge, HeadersTooLarge, InvalidRequest, RequestError, Unauthorized
from server.log import about, note, request_id
from server.settings import HASHED, Settings

access = logging.getLogger("server.access")

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
QUIET_PATHS = frozenset({"/health", "/ready", "/ping", "/metrics"})
MAX_HEADERS = 256
MAX_HEADER_BYTES = 65_536
ALWAYS_OPEN = frozenset({"/health", "/ready", "/ping"})
FILES = "/v1/files"  # whose bodies hold a file, and
FORM_BYTES = 65_536  # beside it, at most so much of a form
FINGERPRINT = 8  # hexadecimal digits of a key's SHA-256: they tell keys apart and give none away
key_holder: ContextVar[str | None] = ContextVar("key_holder", default=None)
"""The fingerprint of the API key that the present request came with."""


def probe_paths(root_path: str) -> frozenset[str]:
    """Where machines ask after the server, with and without the prefix under which a proxy publishes us."""
    return frozenset(prefix + path for prefix in {"", root_path} for path in QUIET_PATHS)


def local_path(scope: Scope) -> str:
    """The path below the prefix under which a proxy publishes us; the proxy may or may not have cut it off."""
    path: str = scope["path"]
    root_path: str = scope.get("root_path", "")
    return path[len(root_path) :] if root_path and path.startswith(root_path + "/") else path


class Observe:
    """Outermost: gives every request an id, which log, trace and answer share, logs and counts it, and turns what
    nobody caught into a 500. Also tells the router of the prefix under which a proxy publishes us."""

    def __init__(self, app: ASGIApp, metrics: Metrics, root_path: str = "") -> None:
        self.app = app
        self._metrics = metrics
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Wrap one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self._root_path:
            scope["root_path"] = self._root_path
        proposed = Headers(scope=scope).get("x-request-id", "")
        identity = proposed if REQUEST_ID.fullmatch(proposed) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = identity
        told: dict[str, object] = {}
        tokens = request_id.set(identity), about.set(told)
        span = trace.get_current_span()
        if (context := span.get_span_context()).is_valid:
            span.set_attribute("entrgi.request_id", identity)
            note(trace_id=f"{context.trace_id:032x}")
        status: int | None = None
        started = time.monotonic()

        async def with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = identity
            await send(message)

        try:
            await self.app(scope, receive, with_id)
        except Exception as error:
            failed = unexpected(error)
            if status is not None:
                raise  # too late for an answer; the server closes the connection
            await error_response(failed)(scope, receive, with_id)
        finally:
            route = getattr(scope.get("route"), "path", "") or "other"
            # A stream that failed or was left had begun with 200, and tells here how it ended. What another process
            # answered is counted there.
            if told.get("replica") is None:
                self._metrics.http_requests.labels(route, str(told.get("error_status", status))).inc()
            access.log(
                logging.DEBUG if local_path(scope) in QUIET_PATHS else logging.INFO,
                "request",
                extra={
                    "method": scope["method"],
                    "path": scope["path"][:200],
                    "status": status,
                    "seconds": round(time.monotonic() - started, 4),
                    **told,
                },
            )
            request_id.reset(tokens[0])
            about.reset(tokens[1])


class Guard:
    """Refuses requests without a valid API key (except to the open paths), with oversized headers, with a body over the
    limit of its path (by its announced length at once, a chunked one as soon as it passes it), and with a body whose
    length two parties could read differently.

    Keys are kept as SHA-256 digests and compared in constant time, all of them each time. Without keys everybody may
    come in. `page_files`, what the page at / loads, are open where it is.
    """

    def __init__(self, app: ASGIApp, settings: Settings, page_files: frozenset[str]) -> None:
        self.app = app
        self._digests = [_kept(key) for key in settings.api_key]
        self._open_paths = ALWAYS_OPEN.union(settings.public_paths, page_files if "/" in settings.public_paths else ())
        self._max_body_bytes = settings.max_body_bytes
        self._larger = {} if settings.batch_dir is None else {FILES: settings.batch_file_bytes + FORM_BYTES}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request pass, counting what is read of its body, or answer it."""
        read, most = 0, self._most(scope)

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > most:
                raise _too_large(most)
            return message

        if scope["type"] == "http":
            try:
                holder = self._check(scope)
                _check_length(Headers(scope=scope), most)
            except RequestError as error:
                await error_response(error)(scope, receive, send)
                return
            if holder is not None:
                note(key=holder)
            token = key_holder.set(holder)
            try:
                await self.app(scope, counted, send)
            finally:
                key_holder.reset(token)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self.app(scope, receive, send)

    def _check(self, scope: Scope) -> str | None:
        """The fingerprint of the request's key; None where none is asked for."""
        if len(scope["headers"]) > MAX_HEADERS:
            raise HeadersTooLarge(f"the header has more than {MAX_HEADERS} fields")
        size = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        if size > MAX_HEADER_BYTES:
            raise HeadersTooLarge(f"the header takes more than {MAX_HEADER_BYTES} bytes")
        if not self._digests or local_path(scope) in self._open_paths:
            return None
        credentials = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(credentials) != 1:
            raise Unauthorized("an API key is needed: send `Authorization: Bearer KEY`")
        scheme, _, key = credentials[0].partition(b" ")
        digest = _digest(key.strip())
        if scheme.lower() != b"bearer" or not self._is_known(digest):
            raise Unauthorized("the API key is not valid")
        return digest.hex()[:FINGERPRINT]

    def _most(self, scope: Scope) -> int:
        """Bytes that the body may have."""
        return self._larger.get(local_path(scope) if scope["type"] == "http" else "", self._max_body_bytes)

    def _is_known(self, digest: bytes) -> bool:
        return sum(hmac.compare_digest(digest, each) for each in self._digests) > 0  # the sum compares all of them


def _check_length(headers: Headers, most: int) -> None:
    announced = headers.get("content-length")
    if announced is None:
        return
    if "transfer-encoding" in headers:
        # A proxy in front of us may have believed the one, and we would believe the other.
        raise InvalidRequest("Content-Length and Transfer-Encoding exclude each other")
    if not re.fullmatch(r"[0-9]{1,19}", announced):
        raise InvalidRequest("Content-Length is not a number")
    if int(announced) > most:
        raise _too_large(most)


def _too_large(most: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body takes more than {most} bytes")


def _kept(key: str) -> bytes:
    """What is kept of an accepted key, which may be given as its hash."""
    return bytes.fromhex(key.removeprefix(HASHED)) if key.startswith(HASHED) else _digest(key.encode())


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class Cors(CORSMiddleware):
    """Starlette's, with refused preflights in the error envelope like everything else."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """The answer to an OPTIONS request of a browser."""
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        kept = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
        return error_response(InvalidRequest(bytes(response.body).decode()), kept)

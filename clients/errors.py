"""What can go wrong, seen from a client.

ClientError
+-- ConnectionFailed            no answer: refused, reset, timed out, name unknown, garbled on the way
+-- UnexpectedResponse          an answer that is not what the server's contract says
+-- StreamBroken                a stream that ended before its `[DONE]`
+-- ApiError                    the server's error envelope; `status` None: it came inside a stream
    +-- BadRequest          400
    +-- AuthenticationFailed 401
    +-- NotFound            404
    +-- DeadlineExceeded    408
    +-- BodyTooLarge        413
    +-- QueueFull           429
    +-- ServerFailed        500
    +-- ScorerFailed        502
    +-- Unavailable         503
"""

from __future__ import annotations

import json
from typing import Any


class ClientError(Exception):
    """Anything these clients raise on purpose."""


class ConnectionFailed(ClientError):
    """The server could not be reached, the connection broke before an answer, or the answer cannot be unpacked."""


class UnexpectedResponse(ClientError):
    """The answer does not have the documented shape: not this server, or another version of it."""


class StreamBroken(ClientError):
    """The stream ended without its `[DONE]`: what came so far may be incomplete."""


class ApiError(ClientError):
    """The server's `{"error": {message, type, param, code}}`.

    `param` is the path of the offending field; `retry_after` (seconds) and `request_id` come from the headers.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        error_type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.type = error_type
        self.param = param
        self.code = code
        self.retry_after = retry_after
        self.request_id = request_id

    def __str__(self) -> str:
        where = f" (param: {self.param})" if self.param else ""
        return f"{self.status or 'error in stream'}: {self.message}{where}"


class BadRequest(ApiError):
    """400: a field is wrong; `param` names it."""


class AuthenticationFailed(ApiError):
    """401: no valid API key."""


class NotFound(ApiError):
    """404: no such model or route."""


class DeadlineExceeded(ApiError):
    """408: the request's `timeout` passed while it waited."""


class BodyTooLarge(ApiError):
    """413."""


class QueueFull(ApiError):
    """429: come back after `retry_after` seconds."""


class ServerFailed(ApiError):
    """500."""


class ScorerFailed(ApiError):
    """502: an outside scorer that the request needs failed; the message names it."""


class Unavailable(ApiError):
    """503: loading, restarting or shutting down; come back after `retry_after` seconds."""


_BY_STATUS: dict[int, type[ApiError]] = {
    400: BadRequest,
    401: AuthenticationFailed,
    404: NotFound,
    408: DeadlineExceeded,
    413: BodyTooLarge,
    429: QueueFull,
    500: ServerFailed,
    502: ScorerFailed,
    503: Unavailable,
}


def from_envelope(
    error: Any, *, status: int | None = None, retry_after: float | None = None, request_id: str | None = None
) -> ApiError:
    """The exception for an `error` object. One that is not an object becomes the message itself."""
    fields = error if isinstance(error, dict) else {"message": str(error)}

    def text(key: str) -> str | None:
        value = fields.get(key)
        return value if isinstance(value, str) else None

    return _BY_STATUS.get(status or 0, ApiError)(
        text("message") or "the server gave no message",
        status=status,
        error_type=text("type"),
        param=text("param"),
        code=text("code"),
        retry_after=retry_after,
        request_id=request_id,
    )


def from_response(
    status: int, body: bytes, *, retry_after: float | None = None, request_id: str | None = None
) -> ApiError:
    """The exception for a response of status >= 400; a body that is not the envelope (a proxy's page) is quoted."""
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        error = body[:200].decode("utf-8", "replace") or f"HTTP status {status}"
    return from_envelope(error, status=status, retry_after=retry_after, request_id=request_id)

"""Every way a request or the start-up can fail, and what it is on the wire. No HTTP library is known here.

A `RequestError` answers one request, a `ConfigurationError` ends the start. Each class below is one row of the table:
its status (its parent's, where it names none), its code, and when it is raised.

Raise these anywhere; `server.api` translates them once. The worker process sends a failure as the plain pair
(`kind`, message), which `wire.messages.Failed` turns back into its class. Messages are for clients: they never hold a
path, an address or a traceback, and `quote` caps what they repeat of the input.
"""

from __future__ import annotations

QUOTED_CHARACTERS = 200
_TYPES = {
    401: "authentication_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    502: "server_error",
    503: "service_unavailable_error",
}
BY_KIND: dict[str, type[RequestError]] = {}
"""Every class of failure that a client can see."""


def quote(value: object) -> str:
    """`value` as it may stand in an error message: its repr, on one line, at most 200 characters."""
    if isinstance(value, str | bytes):
        value = value[: QUOTED_CHARACTERS + 1]  # the repr of a megabyte is not built to be thrown away
    text = repr(value).encode("ascii", "backslashreplace").decode("ascii")
    return text if len(text) <= QUOTED_CHARACTERS else text[: QUOTED_CHARACTERS - 3] + "..."


class EntrgiError(Exception):
    """Anything this server raises on purpose."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConfigurationError(EntrgiError):
    """The server cannot start: a setting or a checkpoint is wrong. The message names the key."""


class RequestError(EntrgiError):
    """One request fails; the server goes on.

    Each class is a row: `status` (its parent's, where it does not say) and `code` are the HTTP status and OpenAI's
    field, OpenAI's `type` follows from the status, and `kind` names the class on the worker's wire (its code, where it
    does not say).
    `retry_after` (seconds) becomes the header of the same name; `retryable` False tells clients that would retry the
    status by habit not to (`x-should-retry: false`).
    """

    status = 500
    type = "server_error"
    code: str | None = None
    kind = "failed"
    retryable = True
    retry_after: float | None = None

    def __init_subclass__(cls, *, code: str, status: int | None = None, kind: str | None = None) -> None:
        super().__init_subclass__()
        cls.status, cls.code, cls.kind = status or cls.status, code, kind or code
        cls.type = _TYPES.get(cls.status, "invalid_request_error")
        BY_KIND[cls.kind] = cls

    def __init__(self, message: str, param: str | None = None, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.param = param
        if retry_after is not None:
            self.retry_after = retry_after


class InvalidRequest(RequestError, status=400, code="invalid_value", kind="invalid_request"):
    """A field is wrong, has no effect, or does not fit the models; `param` is its path (`guidance.eta`)."""


class NotFinite(InvalidRequest, code="not_finite"):
    """The model's or the reward's numbers left the finite range under the request's parameters."""


class Unauthorized(RequestError, status=401, code="invalid_api_key"):
    """The API key is missing or wrong."""


class NotFound(RequestError, status=404, code="not_found"):
    """No such route."""


class UnknownModel(NotFound, code="model_not_found"):
    """No model of that name is served."""

    def __init__(self, message: str, param: str | None = "model") -> None:
        super().__init__(message, param)


class MethodNotAllowed(RequestError, status=405, code="method_not_allowed"):
    """The route exists, but not for this HTTP method."""


class DeadlineExceeded(RequestError, status=408, code="deadline_exceeded", kind="deadline"):
    """The request's deadline passed before its work began."""

    retryable = False


class RequestTimeout(RequestError, status=408, code="request_timeout"):
    """The request's header or body did not arrive in time."""


class BodyTooLarge(RequestError, status=413, code="body_too_large"):
    """The request body is larger than the server takes."""


class UnsupportedMediaType(RequestError, status=415, code="unsupported_media_type"):
    """The request body is not declared to be JSON."""


class HeadersTooLarge(RequestError, status=431, code="headers_too_large"):
    """The request's header fields are larger than the server takes."""


class QueueFull(RequestError, status=429, code="queue_full"):
    """No room in the queue. `retry_after` is the estimated wait in seconds."""

    retry_after = 1.0


class KeyLimit(QueueFull, code="key_limit"):
    """The API key's owner has as much in flight as one may have."""


class ClientGone(RequestError, status=499, code="client_closed_request"):
    """Nobody is left to read this answer."""


class EngineFailed(RequestError, code="internal_error", kind="engine_failed"):
    """The server's own fault."""


class EngineUnusable(EngineFailed, status=503, code="engine_failed", kind="engine_unusable"):
    """The engine could not be started, and no restart of the worker will help."""

    retryable = False


class OutOfMemory(EngineFailed, code="out_of_memory"):
    """The device had no memory for the request, however small the part of it that was tried."""


class AnswerTooLarge(EngineFailed, code="answer_too_large"):
    """What was asked for makes an answer that the worker cannot hand over."""

    retryable = False


class ScorerFailed(RequestError, status=502, code="scorer_failed"):
    """An outside scorer that the request needs did not answer, or not as it should; the message names it."""


class ScorerRefused(ScorerFailed, code="scorer_failed", kind="scorer_refused"):
    """It refused what it was asked, or its function raised, and would do so again."""

    retryable = False


class WorkerLost(RequestError, status=503, code="worker_lost"):
    """Two workers died that ran nothing but this request; it would most likely end the next one, too."""

    retryable = False


class Unavailable(RequestError, status=503, code="unavailable"):
    """Not able to take work now."""

    retry_after = 1.0


class NotReady(Unavailable, code="not_ready"):
    """Still loading, or the worker is being restarted."""


class Draining(Unavailable, code="draining"):
    """Shutting down: requests in flight finish, new ones are refused."""


class ScorerUnavailable(Unavailable, code="scorer_unavailable"):
    """An outside scorer that the request needs has failed so often that it is left alone for a while."""

    retry_after = 10.0


class AdapterGone(Unavailable, code="adapter_gone"):
    """The version of the adapter that the request was accepted with has been replaced or unloaded meanwhile."""


class TooManyConnections(Unavailable, code="too_many_connections"):
    """As many connections are open as the server takes."""

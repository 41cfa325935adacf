"""Every way a request or the start-up can fail, and what it is on the wire. No HTTP library is known here.

    EntrgiError
    +-- RequestError                     answers one request: has a status, an OpenAI `type` and a `code`
    |   +-- InvalidRequest          400  a field is wrong, or does not fit the models; `param` is its path
    |   |   +-- NotFinite           400  the parameters drove the numbers out of the finite range
    |   +-- Unauthorized            401  no valid API key
    |   +-- NotFound                404  no such route
    |   |   +-- UnknownModel        404  no such diffusion or reward model
    |   +-- MethodNotAllowed        405  the route exists, the method does not
    |   +-- DeadlineExceeded        408  the deadline passed before the work began
    |   +-- RequestTimeout          408  the request itself did not arrive in time
    |   +-- BodyTooLarge            413  the request body is over the limit
    |   +-- UnsupportedMediaType    415  the body is not JSON
    |   +-- HeadersTooLarge         431  the header fields are over the limit
    |   +-- QueueFull               429  come back after `retry_after` seconds
    |   +-- EngineFailed            500  our fault: the step, the worker or the handler broke
    |   +-- Unavailable             503  come back after `retry_after` seconds
    |       +-- NotReady                 still loading, or the worker is being restarted
    |       +-- Draining                 shutting down
    |       +-- TooManyConnections       no room for another client
    +-- ConfigurationError               start-up: a bad setting or checkpoint; the message names the key

Raise these anywhere; `server.api` translates them once. The worker process sends a failure as the plain pair
(`kind`, message), and `from_kind` turns it back into its class. Messages are for clients: they never hold a path,
an address or a traceback, and `quote` caps what they repeat of the input.
"""

from __future__ import annotations

QUOTED_CHARACTERS = 200


def quote(value: object) -> str:
    """`value` as it may stand in an error message: its repr, on one line, at most 200 characters."""
    if isinstance(value, str | bytes):
        value = value[: QUOTED_CHARACTERS + 1]  # the repr of a megabyte is not built to be thrown away
    text = repr(value).encode("ascii", "backslashreplace").decode("ascii")
    if len(text) <= QUOTED_CHARACTERS:
        return text
    return text[: QUOTED_CHARACTERS - 3] + "..."


class EntrgiError(Exception):
    """Anything this server raises on purpose."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConfigurationError(EntrgiError):
    """The server cannot start: a setting or a checkpoint is wrong. The message names the key."""


class RequestError(EntrgiError):
    """One request fails; the server goes on.

    `status`, `type` and `code` are the HTTP status and OpenAI's error fields; `kind` names the class on the
    worker's wire; `retry_after` (seconds) becomes the header of the same name; `retryable` False tells clients that
    would retry the status by habit not to (`x-should-retry: false`).
    """

    status = 500
    type = "server_error"
    code: str | None = None
    kind = "failed"
    retryable: bool | None = None

    def __init__(self, message: str, param: str | None = None, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.retry_after = retry_after


class InvalidRequest(RequestError):
    """A field is wrong, has no effect, or does not fit the models; `param` is its path (`guidance.eta`)."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"
    kind = "invalid_request"


class Unauthorized(RequestError):
    """The API key is missing or wrong."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"
    kind = "unauthorized"


class NotFound(RequestError):
    """No such route."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"
    kind = "not_found"


class UnknownModel(NotFound):
    """No model of that name is served."""

    code = "model_not_found"
    kind = "unknown_model"

    def __init__(self, message: str, param: str | None = "model", *, retry_after: float | None = None) -> None:
        super().__init__(message, param, retry_after=retry_after)


class MethodNotAllowed(RequestError):
    """The route exists, but not for this HTTP method."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"
    kind = "method_not_allowed"


class DeadlineExceeded(RequestError):
    """The request's deadline passed before its work began."""

    status = 408
    type = "timeout_error"
    code = "deadline_exceeded"
    kind = "deadline"
    retryable = False


class RequestTimeout(RequestError):
    """The request's header or body did not arrive in time."""

    status = 408
    type = "timeout_error"
    code = "request_timeout"
    kind = "request_timeout"


class BodyTooLarge(RequestError):
    """The request body is larger than the server takes."""

    status = 413
    type = "invalid_request_error"
    code = "body_too_large"
    kind = "body_too_large"


class UnsupportedMediaType(RequestError):
    """The request body is not declared to be JSON."""

    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"
    kind = "unsupported_media_type"


class HeadersTooLarge(RequestError):
    """The request's header fields are larger than the server takes."""

    status = 431
    type = "invalid_request_error"
    code = "headers_too_large"
    kind = "headers_too_large"


class QueueFull(RequestError):
    """No room in the queue. `retry_after` is the estimated wait in seconds."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"
    kind = "queue_full"

    def __init__(
        self,
        message: str = "the queue is full; try again later",
        param: str | None = None,
        *,
        retry_after: float | None = 1.0,
    ) -> None:
        super().__init__(message, param, retry_after=retry_after)


class EngineFailed(RequestError):
    """The server's own fault."""

    kind = "engine_failed"
    code = "internal_error"


class Unavailable(RequestError):
    """Not able to take work now."""

    status = 503
    type = "service_unavailable_error"
    code = "unavailable"
    kind = "unavailable"

    def __init__(
        self,
        message: str = "the server cannot take requests now",
        param: str | None = None,
        *,
        retry_after: float | None = 1.0,
    ) -> None:
        super().__init__(message, param, retry_after=retry_after)


class NotReady(Unavailable):
    """Still loading, or the worker is being restarted."""

    code = "not_ready"
    kind = "not_ready"


class Draining(Unavailable):
    """Shutting down: requests in flight finish, new ones are refused."""

    code = "draining"
    kind = "draining"


class TooManyConnections(Unavailable):
    """As many connections are open as the server takes."""

    code = "too_many_connections"
    kind = "too_many_connections"


class NotFinite(InvalidRequest):
    """The model's or the reward's numbers left the finite range under the request's parameters."""

    code = "not_finite"
    kind = "not_finite"


_BY_KIND: dict[str, type[RequestError]] = {
    error.kind: error
    for error in (
        InvalidRequest,
        NotFinite,
        NotFound,
        UnknownModel,
        DeadlineExceeded,
        QueueFull,
        EngineFailed,
        Unavailable,
        NotReady,
        Draining,
    )
}


def from_kind(kind: str, message: str, param: str | None = None) -> RequestError:
    """The exception for a failure that the worker reported; an unknown kind is an `EngineFailed`."""
    return _BY_KIND.get(kind, EngineFailed)(message, param)

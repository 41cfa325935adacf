"""Requests that mean harm, byte for byte, and the answers that they must get. A table without a server;
`tests/api/test_abuse.py` sends it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

GOOD = b'{"prompt":"Hi","max_tokens":4,"seed":1}'


@dataclass(frozen=True)
class Hostile:
    """Bytes to send over one connection, and the statuses of which the first answer must have one. `closes`: the server
    must end the connection by itself, because it cannot know where the next request would begin."""

    name: str
    data: bytes
    statuses: tuple[int, ...]
    closes: bool = False


def post(body: bytes, *headers: str, path: str = "/v1/completions", length: bool = True) -> bytes:
    """A JSON request."""
    lines = [f"POST {path} HTTP/1.1", "Host: test", "Content-Type: application/json", *headers]
    if length:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def get(*headers: str, path: str = "/version") -> bytes:
    """A request without a body."""
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: test", *headers, "", ""]).encode("latin-1")


def chunked(*chunks: bytes) -> bytes:
    """A chunked JSON request."""
    head = post(b"", "Transfer-Encoding: chunked", length=False)
    return head + b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"


def completion(text: str) -> bytes:
    """A completion whose prompt field is this JSON text."""
    return post(b'{"max_tokens":4,"prompt":' + text.encode("utf-8", "surrogatepass") + b"}")


def requests() -> Iterator[Hostile]:
    """The table."""
    # Sizes.
    yield Hostile("body over the limit, announced", post(b"", "Content-Length: 99999999", length=False), (413,))
    yield Hostile("body over the limit, chunked", chunked(*[b"x" * 60_000] * 40), (413,))
    yield Hostile("header over the limit", get("A: " + "x" * 70_000), (431,))
    yield Hostile("header without an end", b"GET /" + b"x" * 200_000, (431,), closes=True)
    yield Hostile("thousands of header fields", get(*["a: b"] * 5000), (431,))
    yield Hostile("tens of thousands of chunks", chunked(b'{"prompt":"', *[b"x"] * 20_000, b'"}'), (400,), closes=True)
    yield Hostile("a chunk of 2^64 bytes", post(b"", "Transfer-Encoding: chunked", length=False) + b"f" * 16 + b"\r\n",
                  (400, 408, 413))  # fmt: skip
    # JSON.
    yield Hostile("arrays nested 200,000 deep", post(b"[" * 200_000), (400,))
    yield Hostile("objects nested 100,000 deep", post(b'{"a":' * 100_000), (400,))
    yield Hostile("nested 900 deep in metadata", post(b'{"prompt":"Hi","max_tokens":4,"metadata":{"a":' + b"[" * 900
                  + b"]" * 900 + b"}}"), (200, 400))  # fmt: skip
    yield Hostile("an integer of 100,000 digits", post(b'{"prompt":"Hi","seed":' + b"9" * 100_000 + b"}"), (400,))
    yield Hostile("a token id of 399 digits", completion("[" + "9" * 399 + "]"), (400,))
    yield Hostile("a number of 1e999", post(b'{"prompt":"Hi","temperature":1e999}'), (400,))
    yield Hostile("NaN", post(b'{"prompt":"Hi","temperature":NaN}'), (400,))
    yield Hostile("-Infinity", post(b'{"prompt":"Hi","guidance":{"method":"entrgi","eta":-Infinity}}'), (400,))
    yield Hostile("a key twice", post(b'{"prompt":"Hi","prompt":"Ho"}'), (400,))
    yield Hostile("100,000 keys", post(json.dumps({f"k{i}": 1 for i in range(100_000)}).encode()), (400,))
    yield Hostile("100,000 prompts", completion(json.dumps(["a"] * 100_000)), (400,))
    yield Hostile("invalid UTF-8", post(b'{"prompt":"\xff\xfe"}'), (400,))
    yield Hostile("an encoded surrogate", completion('"\ud800"'), (400,))
    yield Hostile("an escaped surrogate", completion('"\\ud800"'), (400,))
    yield Hostile("an escaped surrogate as a key", post(b'{"prompt":"Hi","\\udfff":1}'), (400,))
    yield Hostile("a NUL in the prompt", completion('"a\\u0000b"'), (200,))
    yield Hostile("UTF-16", post('{"prompt":"Hi"}'.encode("utf-16")), (400,))
    yield Hostile("a byte order mark", post(b"\xef\xbb\xbf" + GOOD), (400,))
    yield Hostile("nothing", post(b""), (400,))
    yield Hostile("a compressed body", post(b"\x1f\x8b\x08", "Content-Encoding: gzip"), (415,))
    yield Hostile("a form", post(b"a=b", "Content-Type: application/x-www-form-urlencoded"), (400, 415))
    # Framing: what two servers in a row might read differently.
    yield Hostile("both lengths", post(b"0\r\n\r\n", "Transfer-Encoding: chunked"), (400,))
    yield Hostile("two lengths", post(GOOD, "Content-Length: 5"), (400,), closes=True)
    yield Hostile("a list of lengths", post(GOOD, "Content-Length: 5, 39", length=False), (400,), closes=True)
    yield Hostile("a negative length", post(b"", "Content-Length: -1", length=False), (400,), closes=True)
    yield Hostile("a signed length", post(GOOD, f"Content-Length: +{len(GOOD)}", length=False), (400,), closes=True)
    yield Hostile("a hexadecimal length", post(GOOD, "Content-Length: 0x27", length=False), (400,), closes=True)
    yield Hostile(
        "chunked, but not last", post(b"", "Transfer-Encoding: chunked, gzip", length=False), (400, 501), True
    )
    yield Hostile("chunked twice", post(b"", *["Transfer-Encoding: chunked"] * 2, length=False), (400, 501), True)
    yield Hostile("a misspelt coding", post(b"", "Transfer-Encoding: xchunked", length=False), (400, 501), True)
    yield Hostile("a chunk that is no number", post(b"", "Transfer-Encoding: chunked", length=False) + b"zz\r\n",
                  (400,), closes=True)  # fmt: skip
    nowhere = post(b"", "Transfer-Encoding: chunked", path="/nowhere", length=False)
    yield Hostile("the same where there is no route", nowhere + b"zz\r\n", (400, 404), closes=True)
    yield Hostile("a space before the colon", get("X-Request-Id : a"), (400,), closes=True)
    yield Hostile("a folded length", post(GOOD, f"Content-Length:\r\n {len(GOOD)}", length=False), (200, 400))
    yield Hostile("no host", b"GET /version HTTP/1.1\r\n\r\n", (400,), closes=True)
    yield Hostile("two hosts", get("Host: other"), (400,), closes=True)
    yield Hostile("a bare line feed in the path", b"GET /ver\nsion HTTP/1.1\r\nHost: test\r\n\r\n", (400,), closes=True)
    yield Hostile("not HTTP at all", b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", (400,), closes=True)
    yield Hostile("HTTP/0.9", b"GET /\r\n\r\n", (400,), closes=True)
    yield Hostile("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (400, 404), closes=True)
    yield Hostile("HTTP/9.9", b"GET /version HTTP/9.9\r\nHost: test\r\n\r\n", (200, 400, 505))
    yield Hostile("a websocket", get("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Key: x",
                  path="/v1/models"), (200, 400, 426))  # fmt: skip
    yield Hostile("TRACE", b"TRACE / HTTP/1.1\r\nHost: test\r\n\r\n", (405,))
    yield Hostile("CONNECT", b"CONNECT test:80 HTTP/1.1\r\nHost: test\r\n\r\n", (400, 404, 405))
    yield Hostile("an unknown method", b"GE_T /version HTTP/1.1\r\nHost: test\r\n\r\n", (405,))
    # Places.
    for path in ("/../../etc/passwd", "/v1/models/..%2f..%2f..%2fetc%2fpasswd", "/%2e%2e/%2e%2e/etc/passwd",
                 "/v1/models/%00", "/v1/models/" + "a" * 5000, "//version", "/version/", "/VERSION",
                 "http://test/version", "/%0d%0aSet-Cookie:%20a=b", "/%ff%fe"):  # fmt: skip
        yield Hostile(f"the path {path[:40]}", get(path=path), (404,))
    for model in (
        "../../../etc/passwd",
        "/etc/passwd",
        "file:///etc/passwd",
        "http://169.254.169.254/",
        "\u0000",
        "a" * 500,
    ):
        body = json.dumps({"prompt": "Hi", "max_tokens": 4, "model": model}).encode()
        yield Hostile(f"the model {model[:30]!r}", post(body), (404,))
    # Ids.
    for identity in ("a\tb", "a b", "x" * 129, "\xe9", "a;b", "<script>", '"', "%0d%0a", ""):
        yield Hostile(f"the request id {identity[:10]!r}", get(f"X-Request-Id: {identity}"), (200,))
    yield Hostile("a folded request id", get("X-Request-Id: a\r\n Set-Cookie: b=c"), (200, 400))
    yield Hostile("a NUL in the request id", get("X-Request-Id: a\x00b"), (400,), closes=True)
    yield Hostile("two request ids", get("X-Request-Id: a", "X-Request-Id: b"), (200,))


@dataclass(frozen=True)
class Reply:
    """The first answer on a connection: status 0 when there was none. `closed`: the server ended the connection within
    the time given."""

    status: int
    headers: dict[str, str]
    body: bytes
    closed: bool


def fault(reply: Reply, *, with_body: bool = True) -> str | None:
    """What is wrong with an answer to any request whatever, or None."""
    identity, text = reply.headers.get("x-request-id", ""), reply.body.decode("utf-8", "replace")
    if reply.status >= 500:
        return f"5xx: {reply.status} {text[:200]!r}"
    if reply.status and not re.fullmatch(r"[A-Za-z0-9._-]{1,128}", identity):
        return f"request id: {identity!r}"
    if "set-cookie" in reply.headers:
        return "a header of the client's"
    if reply.status >= 400 and with_body and not (is_envelope(text) and len(text) < 2000):
        return f"not the error object: {reply.status} {text[:200]!r}"
    return None


def is_envelope(text: str) -> bool:
    """Whether a body is exactly OpenAI's error object."""
    try:
        data = json.loads(text)
    except ValueError:
        return False
    if not isinstance(data, dict) or set(data) != {"error"} or not isinstance(data["error"], dict):
        return False
    error = data["error"]
    return (
        set(error) == {"message", "type", "param", "code"}
        and isinstance(error["message"], str)
        and isinstance(error["type"], str)
        and all(error[name] is None or isinstance(error[name], str) for name in ("param", "code"))
    )


async def exchange(port: int, data: bytes, seconds: float = 30.0, linger: float = 0.0) -> Reply:
    """Send bytes and read one answer. With `linger`, then wait that long for the server to close. Raises TimeoutError
    when nothing comes within `seconds`, neither an answer nor the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
    try:
        sending = asyncio.create_task(_send(writer, data))
        async with asyncio.timeout(seconds):
            status, headers, body = await _first_answer(reader, with_body=not data.startswith(b"HEAD "))
        closed = status == 0
        try:
            async with asyncio.timeout(linger):
                while await reader.read(65_536):
                    pass
                closed = True
        except ConnectionError:
            closed = True
        except TimeoutError:
            pass
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        return Reply(status, headers, body, closed)
    finally:
        writer.transport.abort()


async def _send(writer: asyncio.StreamWriter, data: bytes) -> None:
    with contextlib.suppress(OSError):  # the server may answer, and close, before it has read everything
        writer.write(data)
        await writer.drain()


async def _first_answer(reader: asyncio.StreamReader, with_body: bool) -> tuple[int, dict[str, str], bytes]:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        while head.startswith(b"HTTP/1.1 100"):
            head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")[:-2]
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if not with_body:
            body = b""
        elif headers.get("transfer-encoding") == "chunked":
            body = await reader.readuntil(b"\r\n0\r\n\r\n")
        else:
            body = await reader.readexactly(int(headers.get("content-length", "0")))
        return int(first.split()[1]), headers, body
    except (asyncio.IncompleteReadError, OSError):
        return 0, {}, b""

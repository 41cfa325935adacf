"""An application that is asked in its own process: a request in, ASGI's messages out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from starlette.types import ASGIApp, Message, Scope


async def respond(app: ASGIApp, scope: Scope, body: bytes) -> AsyncGenerator[Message]:
    """What `app` answers. When the generator is closed or cancelled, the application hears that the client has gone,
    and its end is waited for."""
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    gone = asyncio.Event()
    parts = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Message:
        for part in parts:
            return part
        await gone.wait()
        return {"type": "http.disconnect"}

    answering = asyncio.ensure_future(app(scope, receive, messages.put))
    answering.add_done_callback(lambda _: messages.put_nowait(None))
    try:
        while (message := await messages.get()) is not None:
            yield message
        await answering  # raises what it raised
    finally:
        gone.set()
        await asyncio.wait({answering})

"""The process in which a scorer's function runs: `python -m server.scorers.child MODULE:FUNCTION FD`.

Frames on the socket FD hold JSON: a call is a list of conversations, each with the responses to it, and the metadata
that all of them share; its answer is the scores, or what was raised and where. The first answer, to no call, says that
the function has been imported. What the function prints goes where the server's own output goes.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from importlib import import_module
from typing import Any

from server.wire.messages import LENGTH, body_length


def frame(action: Callable[..., list[float]], *arguments: Any) -> bytes:
    """What the action gives, or the kind of exception that it raises, its words, and where."""
    told: Any
    try:
        told = action(*arguments)
    except Exception as error:
        where = "".join(traceback.format_tb(error.__traceback__)[-8:])
        told = {"raised": type(error).__name__, "words": str(error), "where": where}
    body = json.dumps(told).encode()
    return LENGTH.pack(len(body)) + body


def end_with(sock: socket.socket) -> None:
    """Wait until the server is gone, then end this process and whatever the function has started."""
    poll = select.poll()
    poll.register(sock, select.POLLHUP)
    poll.poll()
    os.killpg(0, signal.SIGKILL)


def main(target: str, descriptor: int) -> None:
    """Import the function, then answer calls until the server is gone."""
    module, _, name = target.partition(":")
    function: list[Any] = []

    def load() -> list[float]:
        function.append(getattr(import_module(module), name))
        return []

    def call(groups: list[Any], metadata: Any) -> list[float]:
        turns = [[*shared, {"role": "assistant", "content": text}] for shared, texts in groups for text in texts]
        return [float(score) for score in function[0](turns, [metadata] * len(turns))]

    with socket.socket(fileno=descriptor) as sock, sock.makefile("rb") as channel:
        sock.set_inheritable(False)
        threading.Thread(target=end_with, args=(sock,), daemon=True).start()
        sock.sendall(frame(load))
        while prefix := channel.read(LENGTH.size):
            sock.sendall(frame(call, *json.loads(channel.read(body_length(prefix)))))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

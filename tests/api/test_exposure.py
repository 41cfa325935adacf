"""What the server shows to the outside without being asked to, and what a checkpoint's template may do."""

from __future__ import annotations

import json
import logging
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from server.cli import main
from server.errors import InvalidRequest
from server.settings import load
from server.text.template import ChatTemplate
from server.types import Message
from tests.faults import hostile

if TYPE_CHECKING:
    from tests.support.serving import Served


def test_loopback_is_the_default() -> None:
    settings = load({})
    assert settings.host == "127.0.0.1"
    assert settings.cors_origins == settings.public_paths == ()


@pytest.mark.parametrize(
    ("flags", "warned"),
    [
        (["--host", "0.0.0.0"], True),
        (["--host", "::"], True),
        (["--host", "0.0.0.0", "--api-key", "a-key-of-many-letters"], False),
        (["--host", "127.0.0.1"], False),
    ],
)
def test_an_open_server_warns_loudly(
    flags: list[str], warned: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The warning comes before the models are loaded, which fails here."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        assert main([*flags, "--port", str(port), "--model", str(tmp_path), "--log-format", "json"]) == 1
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    warnings = [line["message"] for line in lines if line["level"] == "WARNING"]
    assert any("WITHOUT AN API KEY" in message for message in warnings) == warned
    assert "a-key-of-many-letters" not in json.dumps(lines)


async def test_answers_do_not_name_the_software(server: Served) -> None:
    for data in (hostile.get(), hostile.get(path="/nowhere"), b"nonsense\r\n\r\n", hostile.post(b"{")):
        reply = await hostile.exchange(server.port, data)
        told = json.dumps(reply.headers).lower() + reply.body.decode().lower()
        for name in ("uvicorn", "h11", "starlette", "fastapi", "pydantic", "python", "torch"):
            assert name not in told
        assert "server" not in reply.headers


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{% for i in range(10 ** 8) %}x{% endfor %}",
    "{{ messages[0].__setitem__('role', 'x') }}",
    "{% include 'x' %}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_a_checkpoints_template_cannot_leave_its_sandbox(source: str) -> None:
    with pytest.raises(InvalidRequest):
        ChatTemplate(source, {}, "reward model rm").render([Message("user", "Hi")], add_generation_prompt=True)

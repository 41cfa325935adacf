"""The process: what it shows to the outside without being asked to, what a checkpoint's template may do in it, and its
orderly end."""

from __future__ import annotations

import json
import logging
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.cli import main
from server.errors import InvalidRequest
from server.settings import load
from server.text.template import ChatTemplate
from server.types import Message
from tests.faults import hostile
from tests.support.serving import GOLDEN, Launch, Served, free_port, wait_for


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
    """The warning comes before the models are loaded, which fails here and ends the process."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        assert main([*flags, "--port", str(free_port()), "--model", str(tmp_path), "--log-format", "json"]) == 1
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    assert any("could not be started" in line["message"] for line in lines)
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


SLOW: dict[str, Any] = {
    "prompt": "Tell me", "max_tokens": 48, "guidance": {"method": "entrgi", "gradient_steps": 8}, "best_of": 2,
}  # fmt: skip


def answers(served: Served, path: str) -> int | None:
    try:
        return served.client.get(path).status_code
    except httpx.TransportError:
        return None


def test_drain(launch: Launch) -> None:
    served = launch("--reward-model", str(GOLDEN / "dream-tiny" / "rm"), "--drain-seconds", "120")
    wait_for(lambda: answers(served, "/health") == 200)
    assert answers(served, "/ready") == 503  # the socket is bound before the models are loaded
    served.wait_ready()

    def ask(**fields: Any) -> httpx.Response:
        return httpx.post(f"{served.url}/v1/completions", json={**SLOW, **fields}, timeout=120)

    with ThreadPoolExecutor() as pool:
        asked = [pool.submit(ask, **fields) for fields in ({}, {"seed": 1}, {"stream": True})]
        wait_for(lambda: served.metric("num_requests_running") == 3)
        served.process.send_signal(signal.SIGTERM)
        wait_for(lambda: answers(served, "/ready") == 503)
        assert answers(served, "/health") == 200
        refused = served.post("/v1/completions", SLOW)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "draining"
        assert int(refused.headers["retry-after"]) >= 1
        plain, second, stream = (each.result() for each in asked)
    assert plain.status_code == second.status_code == 200
    assert plain.json()["choices"][0]["text"]
    assert stream.text.endswith("data: [DONE]\n\n")
    assert '"error"' not in stream.text
    assert served.process.wait(60) == 0

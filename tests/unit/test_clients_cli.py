"""What the command line makes of its arguments. Its output is checked against a real server, in
`tests/contract/test_client_against_server.py`."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from clients.canvas import printable
from clients.cli import _parser, generation_options, main
from clients.options import request_body


def body(arguments: str) -> dict[str, Any]:
    return request_body(generation_options(_parser().parse_args(["complete", "Hotel?", *shlex.split(arguments)])))


JOY = {"method": "entrgi", "reward_model": "joy"}
WINDOW = {"method": "of-the-server", "start": 0.1, "stop": 0.9, "every": 2}
WEIGHTED = {"method": "aps", "reward_models": [{"model": "joy", "weight": 1.0}, {"model": "a=b", "weight": 0.5}]}
THRESHOLD = {"algorithm": "threshold", "confidence_threshold": 0.8}
SENT: dict[str, dict[str, Any]] = {
    "": {},
    "--max-tokens 8 --temperature 0.5 --stop . --stop '!'": {"max_tokens": 8, "temperature": 0.5, "stop": [".", "!"]},
    "--guidance entrgi --reward-model joy --best-of 4": {"best_of": 4, "guidance": JOY},
    "--guidance of-the-server --guidance-start 0.1 --guidance-stop 0.9 --guidance-every 2": {"guidance": WINDOW},
    "--guidance aps --reward-model joy --reward-model a=b=0.5": {"guidance": WEIGHTED},
    "--steps 4 --entropy-bound 0.5": {"diffusion": {"steps": 4, "entropy_bound": 0.5}},
    "--algorithm threshold --confidence-threshold 0.8": {"diffusion": THRESHOLD},
}


@pytest.mark.parametrize(("arguments", "sent"), SENT.items())
def test_arguments_are_the_fields_that_are_sent(arguments: str, sent: dict[str, Any]) -> None:
    assert body(arguments) == sent


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["complete", "a", "--eta", "1"], "--eta needs --guidance"),
        (["complete", "a", "--guidance-every", "2"], "--guidance-every needs --guidance"),
        (["complete", "a", "--guidance", "aps", "--reward-model", "joy=much"], "weight"),
        (["loadgen", "--rate", "1", "--requests", "0"], "--requests"),
        (["models", "--url", "http://127.0.0.1:1"], "no answer from"),
    ],
)
def test_errors_are_one_line_and_exit_code_1(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clients.retry.RetryPolicy.wait", lambda *_: None)
    assert main(arguments) == 1
    out, error = capsys.readouterr()
    assert told in " ".join(error.split())
    assert "Traceback" not in error
    assert out == ""


def test_what_could_steer_a_terminal_is_not_printed() -> None:
    assert printable("Lovely \x1b[31mstay.\r\x07\tOr\nnot.\x9b") == "Lovely �[31mstay.��\tOr\nnot.�"

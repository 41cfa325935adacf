"""What the command line makes of its arguments. Its output is checked against a real server, in
`tests/contract/test_client_against_server.py`."""

from __future__ import annotations

import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from clients.arguments import prompts_of
from clients.cli import generation_options, main, parser
from clients.errors import ClientError
from clients.options import request_body
from clients.terminal import printable


def body(arguments: str) -> dict[str, Any]:
    return request_body(generation_options(parser().parse_args(["complete", "Hotel?", *shlex.split(arguments)])))


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
    "--guidance smc": {"guidance": {"method": "bon", "resample": {}}},
    "--guidance entrgi+smc --reward-model joy": {"guidance": {**JOY, "resample": {}}},
    "--guidance aps --resample-by confidence --resample-every 4": {
        "guidance": {"method": "aps", "resample": {"by": "confidence", "every": 4}}
    },
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
        (["complete", "a", "--resample-strength", "2"], "--resample-strength needs --guidance"),
        (["complete", "a", "--guidance", "aps+fast"], "only +smc is wanted"),
        (["complete", "a", "--guidance", "aps", "--reward-model", "joy=much"], "weight"),
        (["complete", "a", "--json", "--stream"], "give one of them"),
        (["score", "-", "-"], "only one argument can be -"),
        (["loadgen", "--rate", "1", "--prompts", "absent.txt"], "absent.txt cannot be read"),
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
    assert told in error
    assert error.count("\n") == 1  # however long: nothing wraps in a pipe
    assert out == ""


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("complete a --max-tokns 8", "--max-tokns: did you mean --max-tokens?"),
        ("complete --guidence=aps", "--guidence: did you mean --guidance?"),
        ("loadgen --raet 2", "--raet: did you mean --rate?"),
        ("score a b --jsno", "--jsno: did you mean --json?"),
    ],
)
def test_a_misspelt_flag_is_named_with_the_nearest(
    arguments: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(shlex.split(arguments))
    assert told in capsys.readouterr().err


ADDRESS = "wanted is a server's address, as http://127.0.0.1:8000, not "


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        *(
            (f"models --url {url}", f"--url: {ADDRESS}'{url}'")
            for url in ("127.0.0.1:9", "localhost:8000", "http://[::1", "http:///x", "http://a:99999", "ftp://a")
        ),
        ("batch in.jsonl out.jsonl --url http://a --url b", f"--url: {ADDRESS}'b'"),
        ("compare --prompts p --out j --judge-url b", f"--judge-url: {ADDRESS}'b'"),
        (
            "compare --prompts p --out j --steps a",
            "--steps: wanted are whole numbers, with commas between them, not 'a'",
        ),
        ("compare --prompts p --out j --eta 1,,2", "--eta: wanted are numbers, with commas between them, not '1,,2'"),
        ("compare --prompts p --out j --curves -1", "--curves: wanted is a whole number from 0 on, not '-1'"),
        ("compare --prompts p --out j --limit 0", "--limit: wanted is a whole number from 1 on, not '0'"),
        ("sample --prompts p --out j.jsonl --keep a", "--keep: wanted is a whole number from 1 on, not 'a'"),
    ],
)
def test_a_value_of_another_kind_is_refused_with_what_is_wanted(
    arguments: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments.split())
    assert told in capsys.readouterr().err


REQUIRED = {"loadgen": ("--rate", "--concurrency"), "compare": ("--prompts", "--out"), "eval": ("--out",)}
REQUIRED["sample"] = REQUIRED["compare"]
COMMANDS = ["complete", "models", "score", "rerank", "loadgen", "compare", "eval", "sample", "batch"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_every_flag_is_by_default(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    flags = re.findall(r"^  (--[\w-]+ \S.*(?:\n {5}.*)?)", capsys.readouterr().out, re.MULTILINE)
    assert "--url" in flags[0]
    assert [
        flag for flag in flags if "(default: " not in flag and not flag.startswith(REQUIRED.get(command, "/"))
    ] == []


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hotel?"}]
PROMPT_FILES = {
    "plain.txt": ("Hotel?\n\n Phone?\r\n", ["Hotel?", " Phone?"]),
    "objects.jsonl": (
        f'{{"prompt": "Hotel?", "id": 1}}\n{{"messages": {json.dumps(MESSAGES)}}}\n'
        f'{{"prompt": {json.dumps(MESSAGES)}}}\n',
        ["Hotel?", MESSAGES, MESSAGES],
    ),
    "objects": ('{"prompt": "{"}', ["{"]),
}


@pytest.mark.parametrize("name", PROMPT_FILES)
def test_prompts_come_from_text_or_json_lines(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, prompts = PROMPT_FILES[name]
    (tmp_path / name).write_bytes(text.encode())
    assert prompts_of(str(tmp_path / name)) == prompts
    if not name.endswith(".jsonl"):  # without a name, the first character tells
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        assert prompts_of("-") == prompts


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("table.csv", b"prompt\nHotel?\n"), ("image.txt", b"\x89PNG\r\n\x1a\n"), ("empty.txt", b"\n"),
        ("text.jsonl", b"Hotel?\n"), ("list.jsonl", b'["Hotel?"]'), ("other.jsonl", b'{"text": "Hotel?"}'),
        ("both.jsonl", b'{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}'),
        ("turns.jsonl", b'{"messages": [{"role": "user"}]}'), ("whole", b'{\n"prompt": "Hotel?"}'),
    ],
)  # fmt: skip
def test_a_file_of_another_kind_is_refused_with_what_is_wanted(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ClientError, match=rf"{name}.*one prompt on each line.*`prompt`.*`messages`"):
        prompts_of(str(tmp_path / name))


def test_what_could_steer_a_terminal_is_not_printed() -> None:
    assert printable("Lovely \x1b[31mstay.\r\x07\tOr\nnot.\x9b") == "Lovely �[31mstay.��\tOr\nnot.�"

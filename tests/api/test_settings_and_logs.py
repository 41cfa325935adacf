"""Settings: who wins, what is refused and how. Logs: no line that a client wrote."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server import log
from server.cli import engine_config, parser
from server.metrics import Metrics, WorkerSnapshot
from server.settings import Settings, SettingsError, load, reward_models, unknown_variables


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"ENTRGI_{name.upper()}", raising=False)
    monkeypatch.delenv("ENTRGI_CONFIG", raising=False)


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("port: 1001\nmax-queue: 11\nhost: 0.0.0.0\nreward_model: [a=x, b=y]\n")
    monkeypatch.setenv("ENTRGI_PORT", "1002")
    monkeypatch.setenv("ENTRGI_MAX_QUEUE", "12")
    settings = load({"port": "1003"}, file)
    assert (settings.port, settings.max_queue, settings.host) == (1003, 12, "0.0.0.0")
    assert settings.reward_model == ["a=x", "b=y"]
    assert settings.max_prompts == 128
    monkeypatch.setenv("ENTRGI_CONFIG", str(file))
    assert load({}).host == "0.0.0.0"


def test_lists_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENTRGI_API_KEY", "key-number-one, key-number-two")
    monkeypatch.setenv("ENTRGI_REWARD_MODEL", '["a=x", "org/name"]')
    settings = load({})
    assert [key.get_secret_value() for key in settings.api_key] == ["key-number-one", "key-number-two"]
    assert reward_models(settings.reward_model) == {"a": "x", "org/name": "org/name"}
    assert "key-number-one" not in repr(settings)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("port", "http"), ("port", "70000"), ("max_queue", "0"), ("dtype", "int8"), ("device", "tpu"),
        ("drain_seconds", "-1"), ("api_key", ["short"]), ("reward_model", ["=x"]), ("reward_model", ["a=x", "a=y"]),
        ("root_path", "llm"), ("served_model_name", "a b"), ("model", " "), ("vocab_fallback", "mean"),
        ("log_level", "LOUD"), ("no_such_key", "1"), ("keep_alive_seconds", "nan"),
    ],
)  # fmt: skip
def test_a_bad_value_names_its_key(key: str, value: object) -> None:
    with pytest.raises(SettingsError, match=f"^{key}: "):
        load({key: value})


def test_bad_values_from_the_environment_and_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("prot: 8000\n")
    with pytest.raises(SettingsError, match=r"^prot: is not a setting"):
        load({}, file)
    file.write_text("- a\n")
    with pytest.raises(SettingsError, match=r"^config: "):
        load({}, file)
    file.write_text("a: [\n")
    with pytest.raises(SettingsError, match=r"^config: "):
        load({}, file)
    with pytest.raises(SettingsError, match=r"^config: "):
        load({}, tmp_path / "absent.yaml")
    monkeypatch.setenv("ENTRGI_PORT", "http")
    with pytest.raises(SettingsError, match=r"^port: "):
        load({})


def test_secrets_are_not_repeated() -> None:
    with pytest.raises(SettingsError) as caught:
        load({"api_key": ["tiny"]})
    assert "tiny" not in str(caught.value)


def test_misspelt_variables_are_noticed() -> None:
    environment = {"ENTRGI_PORT": "1", "ENTRGI_PROT": "1", "ENTRGI_CONFIG": "x", "PATH": "/"}
    assert unknown_variables(environment) == ["ENTRGI_PROT"]


def test_help_says_every_key_and_default() -> None:
    text = " ".join(parser().format_help().split())
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in text
        if field.default not in (None, "", []):
            assert f"(default: {field.default})" in text


def test_command_line_refuses_bad_settings() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "server", "serve", "--port", "http"],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: port: ")


def test_engine_config_of_settings() -> None:
    settings = load({"model": "org/dlm", "reward_model": ["a=x", "b=y"], "max_queue": 7, "batch_tokens": 99})
    config = engine_config(settings)
    assert config.worker.model == "org/dlm"
    assert config.worker.reward_models == {"a": "x", "b": "y"}
    assert list(config.worker.reward_models) == ["a", "b"]
    assert config.max_jobs == 7
    assert config.worker.budget.tokens == 99


# -- logs ----------------------------------------------------------------------------------------------------


@pytest.fixture
def logger() -> Iterator[tuple[logging.Logger, logging.StreamHandler[io.StringIO]]]:
    logger = logging.getLogger("test.log")
    handler = logging.StreamHandler(io.StringIO())
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel("INFO")
    yield logger, handler
    logger.removeHandler(handler)


EVIL = 'x"\n{"level": "INFO", "message": "forged"}\r\x1b[31m\u2028'


def test_json_lines_cannot_be_forged(
    logger: tuple[logging.Logger, logging.StreamHandler[io.StringIO]],
) -> None:
    log_to, handler = logger
    handler.setFormatter(log.JSONFormatter())
    token = log.request_id.set("id-1")
    log_to.info("got %s", EVIL, extra={"path": EVIL})
    try:
        raise ValueError(EVIL)
    except ValueError:
        log_to.exception("broke")
    log.request_id.reset(token)
    lines = handler.stream.getvalue().splitlines()
    assert len(lines) == 2
    first, second = map(json.loads, lines)
    assert first["message"] == f"got {EVIL}"
    assert first["path"] == EVIL
    assert first["request_id"] == second["request_id"] == "id-1"
    assert "ValueError" in second["traceback"]


def test_console_lines_cannot_be_forged(
    logger: tuple[logging.Logger, logging.StreamHandler[io.StringIO]],
) -> None:
    log_to, handler = logger
    handler.setFormatter(log.ConsoleFormatter())
    log_to.info("got %s", EVIL, extra={"path": EVIL})
    text = handler.stream.getvalue()
    assert len(text.splitlines()) == 1
    assert "\x1b" not in text
    assert text.rstrip("\n").isprintable()


# -- metrics -------------------------------------------------------------------------------------------------


def test_two_applications_do_not_share_metrics() -> None:
    first, second = (Metrics(lambda: WorkerSnapshot()) for _ in range(2))
    first.introduce("m")
    first.prompt_tokens.labels("m").inc(5)
    assert b'prompt_tokens_total{model_name="m"} 5.0' in first.render()
    assert b"prompt_tokens_total{" not in second.render()

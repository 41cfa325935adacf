"""Settings: who wins, what is refused and how. Logs: no line that a client wrote."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server import log
from server.cli import engine_config, parser
from server.metrics import FIRST_TOKEN_BUCKETS, LATENCY_BUCKETS, REWARD_BUCKETS, Metrics, WorkerSnapshot
from server.settings import Settings, SettingsError, load, reward_models, unknown_variables
from server.wire.stats import SECONDS_BOUNDS


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
        ("served_model_name", ["a", "b c"]), ("api_key", ["sha256:0a1b"]), ("otlp_endpoint", "collector:4318"),
        ("ssl_keyfile", "absent.pem"), ("log_level", "LOUD"), ("no_such_key", "1"), ("keep_alive_seconds", "nan"),
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


def test_keys_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    digest = hashlib.sha256(b"key-number-three").hexdigest()
    file.write_text(f"# who has it\n\n  key-number-two \nsha256:{digest}\n")
    settings = load({"api_key": ["key-number-one"], "api_key_file": str(file)})
    keys = [key.get_secret_value() for key in settings.api_key]
    assert keys == ["key-number-one", "key-number-two", f"sha256:{digest}"]
    assert "key-number-two" not in repr(settings)
    for text in ("", "# nothing\n", "short\n", "kéy-number-four\n", "sha256:12\n"):
        file.write_text(text)
        with pytest.raises(SettingsError, match=r"^api_key_file: ") as caught:
            load({"api_key_file": str(file)})
        assert text.strip() == "" or text.strip() not in str(caught.value)
    with pytest.raises(SettingsError, match=r"^api_key_file: "):
        load({"api_key_file": str(tmp_path / "absent")})


def test_names_may_be_listed_with_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load({"served_model_name": ["a,b", "c", "a"]}).served_model_name == ["a", "b", "c"]
    monkeypatch.setenv("ENTRGI_SERVED_MODEL_NAME", "x, y")
    assert load({}).served_model_name == ["x", "y"]
    assert load({"disable_savings": ["a,b"]}).disable_savings == ["a", "b"]


def test_misspelt_variables_are_noticed() -> None:
    environment = {"ENTRGI_PORT": "1", "ENTRGI_PROT": "1", "ENTRGI_CONFIG": "x", "PATH": "/"}
    assert unknown_variables(environment) == ["ENTRGI_PROT"]


def test_help_says_every_key_and_default() -> None:
    text = " ".join(parser().format_help().split())
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in text
        if field.default not in (None, "", []):
            assert f"(default: {field.default})" in text


@pytest.mark.parametrize(("key", "value"), [("port", "http"), ("disable_savings", "skip_nothing")])
def test_command_line_refuses_bad_settings(key: str, value: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "server", "serve", "--" + key.replace("_", "-"), value],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {key}: ")


def test_engine_config_of_settings() -> None:
    settings = load({"model": "org/dlm", "reward_model": ["a=x", "b=y"], "max_queue": 7, "batch_tokens": 99})
    config = engine_config(settings)
    assert config.worker.model == "org/dlm"
    assert config.worker.reward_models == {"a": "x", "b": "y"}
    assert list(config.worker.reward_models) == ["a", "b"]
    assert config.max_jobs == 7
    assert config.worker.budget.tokens == 99
    assert config.worker.served_model_name is None
    assert engine_config(load({})).worker.served_model_name == "entrgi-demo-1.4m"
    named = engine_config(load({"served_model_name": ["mine", "other"], "disable_savings": ["skip_empty_steps"]}))
    assert named.worker.served_model_name == "mine"
    assert named.worker.disable_savings == ("skip_empty_steps",)


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


def test_the_sum_of_final_rewards_is_exported_though_some_are_negative() -> None:
    metrics = Metrics(lambda: WorkerSnapshot())
    for reward in (2.5, -4.0, 0.25):
        metrics.observe_reward("rm", "bon", reward)
    metrics.observe_reward("rm", "entrgi", 1.0)
    found = {
        (sample.name, sample.labels.get("method"), sample.labels.get("sign")): sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
        if "le" not in sample.labels
    }
    assert found["entrgi:final_reward_count", "bon", None] == 3
    size = "entrgi:final_reward_size_total"
    assert (found[size, "bon", "positive"], found[size, "bon", "negative"]) == (2.75, 4.0)
    assert (found[size, "entrgi", "positive"], found[size, "entrgi", "negative"]) == (1.0, 0.0)  # both exist at once


def test_buckets_hold_vllms_bounds_and_tell_milliseconds_apart() -> None:
    vllm = {0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0}
    assert vllm < set(LATENCY_BUCKETS)
    for buckets in (LATENCY_BUCKETS, FIRST_TOKEN_BUCKETS, SECONDS_BOUNDS, REWARD_BUCKETS):
        assert list(buckets) == sorted(set(buckets))
    for buckets in (LATENCY_BUCKETS, FIRST_TOKEN_BUCKETS, SECONDS_BOUNDS):
        assert buckets[0] <= 0.001
        assert sum(bound < 0.1 for bound in buckets) >= 5
